"""Dense layers in Triton (equations: `bpfree_kernels.ops.dense`), and what their kernels share.

That is z = x Wᵀ + b as a tile, the update kernel postᵀ · pre, and the update of a few rows by the
program that has made their signal.

In the tiles N counts samples, H outputs (rows of the weight), K inputs. Offsets of rows are int64: a
weight may hold more than 2³¹ elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.activations import activate
from bpfree_kernels.triton.launch import Blocks, launch, on_matrix_units, products, sizes
from bpfree_kernels.triton.optimizers import (
    Learning,
    Target,
    keep_gradients,
    learn_in_place,
    make_target,
    prepare,
    write,
)

FORWARD_BLOCKS = {True: Blocks(64, 64, 64, 8, 3), False: Blocks(64, 64, 32, 8, 2)}
"""Tiles of a forward pass over a (samples, outputs) grid, with matrix units and without."""

UPDATE_BLOCKS = {
    # (rows of the weight at most 16, 16-bit elements): a layer of few classes fills no taller tile
    (True, False): Blocks(32, 16, 128, 8, 3),
    (True, True): Blocks(64, 16, 128, 8, 3),
    (False, False): Blocks(32, 64, 64, 8, 3),
    (False, True): Blocks(64, 64, 64, 8, 3),
}
"""Tiles of the update kernel."""

STEP_BLOCKS = {
    # On matrix units? Then by the batch that a block holds and by rows of a program: 16 rows keep the
    # processors of a large GPU busy with 1000 units; more units allow 32, which read x half as often.
    True: (
        Blocks(32, 16, 64, 8, 3), Blocks(64, 16, 64, 8, 3), Blocks(128, 16, 32, 8, 3),
        Blocks(32, 32, 32, 8, 3), Blocks(64, 32, 32, 8, 3), Blocks(128, 32, 32, 8, 3),
    ),
    False: (
        Blocks(32, 16, 64, 8, 2), Blocks(64, 16, 64, 8, 2), Blocks(128, 16, 16, 8, 2),
        Blocks(32, 32, 16, 8, 3), Blocks(64, 32, 16, 8, 2), Blocks(128, 32, 32, 8, 2),
    ),
}  # fmt: skip
"""Tiles of a kernel that makes the signal of a few rows and updates them, in one launch."""

_MANY_UNITS = 2048

_NOTHING = Target(None)


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
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, y_ptr, slope, batch, outputs, inputs,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of z = x Wᵀ + b and, where `y_ptr` says where to, of f(z)."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    samples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    z = linear_tile(
        x_ptr, weight_ptr, bias_ptr, samples, units, batch, outputs, inputs,
        BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    offsets = samples.to(tl.int64)[:, None] * outputs + units[None, :]
    mask = (samples < batch)[:, None] & (units < outputs)[None, :]
    tl.store(z_ptr + offsets, z, mask=mask)
    if y_ptr is not None:
        y, _ = activate(z, slope, ACTIVATION)
        tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def update_rows(
    post, scale, pre_ptr, weight, bias, rule, samples, units, batch, outputs, inputs,
    EPILOGUE: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Update some rows of the weight, and their biases, with scale · postᵀ · pre.

    `post` is their float32 signal for the whole batch. Whatever else is needed of these rows has been
    read, and used in a product, before: a product's barriers keep a fast warp from updating what a
    slow one reads.
    """
    has_unit = units < outputs
    if bias.data is not None:
        scalars = prepare(bias, rule, EPILOGUE)
        write(bias, rule, scalars, units, has_unit, scale * tl.sum(post, 0), EPILOGUE)
    scalars = prepare(weight, rule, EPILOGUE)
    signal = tl.trans(post.to(OPERAND))
    has_sample = (samples < batch)[:, None]
    pre_rows = pre_ptr + samples.to(tl.int64)[:, None] * inputs
    rows = units.to(tl.int64)[:, None] * inputs
    # Asked for by name, the pipeline fetches the next weights and moments ahead, not only the next pre.
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        has_column = columns < inputs
        pre = tl.load(pre_rows + columns, mask=has_sample & has_column, other=0.0)
        gradient = tl.dot(signal, pre.to(OPERAND), input_precision=PRECISION)
        mask = has_unit[:, None] & has_column
        write(weight, rule, scalars, rows + columns, mask, scale * gradient, EPILOGUE)


@triton.jit(do_not_specialize=["batch", "outputs", "inputs"])
def update_kernel(
    post_ptr, pre_ptr, weight, bias, feedback, rule, scale, feedback_scale, batch, outputs, inputs,
    EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scale · postᵀ · pre into `weight`, and times `feedback_scale` into `feedback`.

    By one program of each row its ∂b goes into `bias`.
    """
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
    gradient *= scale
    scalars = prepare(weight, rule, EPILOGUE)
    write(weight, rule, scalars, offsets, mask, gradient, EPILOGUE)
    if feedback.data is not None:
        scalars = prepare(feedback, rule, EPILOGUE)
        write(feedback, rule, scalars, offsets, mask, feedback_scale * gradient, EPILOGUE)
    if bias.data is not None and tl.program_id(1) == 0:
        scalars = prepare(bias, rule, EPILOGUE)
        write(bias, rule, scalars, units, has_unit, scale * bias_gradient, EPILOGUE)


def learn(
    post: Tensor,
    pre: Tensor,
    scale: float,
    learning: Learning,
    feedback: Target = _NOTHING,
    feedback_scale: float = 1.0,
) -> None:
    """Let a dense layer learn: ∂W = scale · postᵀ · pre and ∂b = scale · Σ post, in one launch.

    Args:
        post: signal of each output unit, [batch, out].
        pre: input of the layer, [batch, in].
        scale: factor of both gradients, applied in float32 (16-bit signals keep their range).
        learning: what is written, and how.
        feedback: a weight that learns ``feedback_scale * ∂W`` by the same rule.
        feedback_scale: γ.
    """
    (batch, outputs), inputs = post.shape, pre.shape[1]
    blocks = UPDATE_BLOCKS[outputs <= 16, post.element_size() == 2]
    # Without inputs there is still a bias to update.
    grid = (triton.cdiv(outputs, blocks.BLOCK_H), max(1, triton.cdiv(inputs, blocks.BLOCK_K)))
    launch(
        update_kernel, grid, post, pre, scale=scale, batch=batch, on=post, **learning._asdict(),
        feedback=feedback, feedback_scale=feedback_scale,
        **sizes(outputs=outputs, inputs=inputs), **products(post, blocks),
    )  # fmt: skip


def forward_blocks(x: Tensor) -> Blocks:
    """Tiles of a forward pass over a (samples, outputs) grid."""
    return FORWARD_BLOCKS[on_matrix_units(x)]


def step_blocks(x: Tensor, outputs: int) -> Blocks | None:
    """Tiles of a step in one launch; ``None`` for a batch that is too large for that."""
    rows = 32 if outputs > _MANY_UNITS else 16
    fitting = (
        blocks
        for blocks in STEP_BLOCKS[on_matrix_units(x)]
        if rows == blocks.BLOCK_H and x.shape[0] <= blocks.BLOCK_N
    )
    return next(fitting, None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    y: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> None:
    """Write x Wᵀ + b to `z` [batch, out] and, if `y` is given, f(z) to it, in one launch."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    blocks = forward_blocks(x)
    grid = (triton.cdiv(batch, blocks.BLOCK_N), triton.cdiv(outputs, blocks.BLOCK_H))
    launch(
        linear_kernel, grid, x, weight, bias, z, y, slope, batch, on=x,
        **sizes(outputs=outputs, inputs=inputs), ACTIVATION=activation, **products(x, blocks),
    )  # fmt: skip


def dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """z = W x + b and f(z), both [batch, out]."""
    z = x.new_empty(x.shape[0], weight.shape[0])
    y = torch.empty_like(z)
    linear(x, weight, bias, z, y, activation, slope)
    return z, y


def dense_step(
    post: Tensor,
    pre: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    scale: float,
    feedback_scale: float,
    *update: Any,
) -> None:
    """Weight, bias, feedback and their state updated in place."""
    learning = learn_in_place(weight, bias, update[:14])
    target = make_target(feedback, *update[14:])
    learn(post, pre, scale, learning, target, feedback_scale)


def dense_grad(
    post: Tensor,
    pre: Tensor,
    scale: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> None:
    """The gradients, written or added to those given."""
    learn(post, pre, scale, keep_gradients(grad_weight, grad_bias, accumulate))
