"""What the kernels of dense layers share: z = x Wᵀ + b as a tile, and the update kernel postᵀ · pre.

In the tiles N counts samples, H outputs (rows of the weight), K inputs. Offsets of rows are int64: a
weight may hold more than 2³¹ elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.launch import Blocks, launch, on_matrix_units, products, sizes
from bpfree_kernels.triton.optimizers import Learning, prepare, write

FORWARD_BLOCKS = {True: Blocks(64, 64, 64, 8, 3), False: Blocks(64, 64, 16, 8, 3)}
"""Tiles of a forward pass over a (samples, outputs) grid, with matrix units and without."""

UPDATE_BLOCKS = {
    # (rows of the weight at most 16, bytes of an element): a layer of few classes fills no taller tile
    (True, 4): Blocks(32, 16, 128, 8, 3),
    (True, 2): Blocks(64, 16, 128, 8, 3),
    (False, 4): Blocks(32, 64, 64, 8, 3),
    (False, 2): Blocks(64, 64, 64, 8, 3),
}
"""Tiles of the update kernel."""


@triton.jit
def linear_tile(
    x_ptr, weight_ptr, bias_ptr, samples, units, batch, outputs, inputs,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x Wᵀ + b of some samples and units, float32 [samples, units]; 0 outside the layer."""
    has_sample = (samples < batch)[:, None]
    has_unit = (units < outputs)[None, :]
    x_rows = x_ptr + samples.to(tl.int64)[:, None] * inputs
    weight_rows = weight_ptr + units.to(tl.int64)[None, :] * inputs
    z = tl.zeros([samples.shape[0], units.shape[0]], tl.float32)
    if bias_ptr is not None:
        # Read before the loop, whose barriers keep a fast warp from updating what a slow one reads.
        z += tl.load(bias_ptr + units, mask=units < outputs, other=0.0).to(tl.float32)[None, :]
    for start in range(0, inputs, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        has_column = columns < inputs
        x_mask = has_sample & has_column[None, :]
        x = tl.load(x_rows + columns[None, :], mask=x_mask, other=0.0)
        weight_mask = has_column[:, None] & has_unit
        weight = tl.load(weight_rows + columns[:, None], mask=weight_mask, other=0.0)
        z = tl.dot(x.to(OPERAND), weight.to(OPERAND), z, input_precision=PRECISION)
    return z


@triton.jit(do_not_specialize=["batch", "outputs", "inputs"])
def update_kernel(
    post_ptr, pre_ptr, weight, bias, rule, scale, batch, outputs, inputs,
    EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scale · postᵀ · pre into `weight`, and by one program of each row its ∂b into `bias`."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    has_unit = units < outputs
    has_column = columns < inputs
    gradient = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    bias_gradient = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, batch, BLOCK_N):
        samples = start + tl.arange(0, BLOCK_N)
        has_sample = (samples < batch)[:, None]
        rows = samples.to(tl.int64)[:, None]
        post_mask = has_sample & has_unit[None, :]
        post = tl.load(post_ptr + rows * outputs + units[None, :], mask=post_mask, other=0.0)
        pre_mask = has_sample & has_column[None, :]
        pre = tl.load(pre_ptr + rows * inputs + columns[None, :], mask=pre_mask, other=0.0)
        signal = tl.trans(post.to(OPERAND))
        gradient = tl.dot(signal, pre.to(OPERAND), gradient, input_precision=PRECISION)
        if bias.data is not None:
            bias_gradient += tl.sum(post.to(tl.float32), 0)
    offsets = units.to(tl.int64)[:, None] * inputs + columns[None, :]
    mask = has_unit[:, None] & has_column[None, :]
    scalars = prepare(weight, rule, EPILOGUE)
    write(weight, rule, scalars, offsets, mask, scale * gradient, EPILOGUE)
    if bias.data is not None and tl.program_id(1) == 0:
        scalars = prepare(bias, rule, EPILOGUE)
        write(bias, rule, scalars, units, has_unit, scale * bias_gradient, EPILOGUE)


def learn(post: Tensor, pre: Tensor, scale: float, learning: Learning) -> None:
    """Let a dense layer learn: ∂W = scale · postᵀ · pre and ∂b = scale · Σ post, in one launch.

    Args:
        post: signal of each output unit, [batch, out].
        pre: input of the layer, [batch, in].
        scale: factor of both gradients, applied in float32 (16-bit signals keep their range).
        learning: what is written, and how.
    """
    (batch, outputs), inputs = post.shape, pre.shape[1]
    blocks = UPDATE_BLOCKS[outputs <= 16, post.element_size()]
    # Without inputs there is still a bias to update.
    grid = (triton.cdiv(outputs, blocks.BLOCK_H), max(1, triton.cdiv(inputs, blocks.BLOCK_K)))
    launch(
        update_kernel, grid, post, pre, scale=scale, batch=batch, on=post, **learning._asdict(),
        **sizes(outputs=outputs, inputs=inputs), **products(post, blocks),
    )  # fmt: skip


def forward_blocks(x: Tensor) -> Blocks:
    """Tiles of a forward pass over a (samples, outputs) grid."""
    return FORWARD_BLOCKS[on_matrix_units(x)]
