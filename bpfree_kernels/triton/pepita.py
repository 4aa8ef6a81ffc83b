"""PEPITA's second pass in Triton (equations: `bpfree_kernels.ops.pepita`), in the difference form.

A batch that fits into one block takes one launch: a program owns a few rows of the weight, works out how
the output of their units changes, and updates them. A larger batch takes two: the change, then the update
kernel of dense layers.

In the first layer Δz = W (F e) is formed as (W F) e inside the kernel where there are few classes: it costs
as much as a pass of that many samples, and F e is never stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.activations import difference
from bpfree_kernels.triton.dense import (
    forward_blocks,
    learn,
    linear_tile,
    step_blocks,
    update_rows,
)
from bpfree_kernels.triton.launch import Blocks, launch, on_matrix_units, products, sizes
from bpfree_kernels.triton.optimizers import Learning, keep_gradients, learn_in_place

MOST_CLASSES = {True: 64, False: 16}
"""With matrix units and without: up to this many classes go through (W F) e, in one block.

Plain multiply-adds hold a whole block of classes in registers.
"""

DIFFERENCE_BLOCKS = Blocks(16, 128, 16, 4, 3)
"""Tiles of `pepita_difference`: samples, elements of a sample, classes of the basis."""


@triton.jit
def _change_of_output(
    z_ptr, change_ptr, feedback_ptr, mask_ptr, weight_ptr, changed_ptr, slope, samples, units,
    batch, classes, outputs, inputs,
    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store Δh of some samples and units; the same tile unrounded, in float32, 0 outside the layer."""
    if feedback_ptr is None:
        dz = linear_tile(
            change_ptr, weight_ptr, None, samples, units, batch, outputs, inputs,
            BLOCK_K, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        places = tl.arange(0, BLOCK_C)
        basis = linear_tile(
            feedback_ptr, weight_ptr, None, places, units, classes, outputs, inputs,
            BLOCK_K, OPERAND, PRECISION,
        )  # fmt: skip
        error_rows = change_ptr + samples.to(tl.int64)[:, None] * classes
        error_mask = (samples < batch)[:, None] & (places < classes)[None, :]
        error = tl.load(error_rows + places[None, :], mask=error_mask, other=0.0)
        dz = tl.dot(error.to(OPERAND), basis.to(OPERAND), input_precision=PRECISION)
    offsets = samples.to(tl.int64)[:, None] * outputs + units[None, :]
    inside = (samples < batch)[:, None] & (units < outputs)[None, :]
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    changed = difference(z, dz, slope, ACTIVATION)
    if mask_ptr is not None:
        changed *= tl.load(mask_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(changed_ptr + offsets, changed, mask=inside)
    return changed


@triton.jit(do_not_specialize=["batch", "classes", "outputs", "inputs"])
def change_and_learn_kernel(
    z_ptr, change_ptr, feedback_ptr, mask_ptr, weight_ptr, changed_ptr, slope,
    pre_ptr, scale, batch, classes, outputs, inputs, weight, bias, rule,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Change of the output, and update of BLOCK_H rows of the weight, for the whole batch."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    samples = tl.arange(0, BLOCK_N)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    changed = _change_of_output(
        z_ptr, change_ptr, feedback_ptr, mask_ptr, weight_ptr, changed_ptr, slope, samples, units,
        batch, classes, outputs, inputs, ACTIVATION, BLOCK_C, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    update_rows(
        changed, scale, pre_ptr, weight, bias, rule, samples, units, batch, outputs, inputs,
        EPILOGUE, BLOCK_K, OPERAND, PRECISION, num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "classes", "outputs", "inputs"])
def change_kernel(
    z_ptr, change_ptr, feedback_ptr, mask_ptr, weight_ptr, changed_ptr, slope,
    batch, classes, outputs, inputs, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Change of the output in a tile, for a batch that needs several."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    samples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    _change_of_output(
        z_ptr, change_ptr, feedback_ptr, mask_ptr, weight_ptr, changed_ptr, slope, samples, units,
        batch, classes, outputs, inputs, ACTIVATION, BLOCK_C, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "classes", "size"])
def difference_kernel(
    z_ptr, change_ptr, basis_ptr, changed_ptr, slope, batch, classes, size,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SIZE_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f(z + Δz) − f(z) of a tile (samples, elements of a sample)."""
    size *= SIZE_BY
    tiles = tl.cdiv(size, BLOCK_H)  # of a sample; one axis, as the second has room for few of them
    samples = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    elements = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = samples.to(tl.int64)[:, None]
    has_sample = (samples < batch)[:, None]
    has_element = (elements < size)[None, :]
    offsets = rows * size + elements[None, :]
    mask = has_sample & has_element
    if basis_ptr is None:
        dz = tl.load(change_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        dz = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        for start in range(0, classes, BLOCK_K):
            places = start + tl.arange(0, BLOCK_K)
            has_place = places < classes
            error_mask = has_sample & has_place[None, :]
            error = tl.load(change_ptr + rows * classes + places[None, :], error_mask, other=0.0)
            images = basis_ptr + places.to(tl.int64)[:, None] * size + elements[None, :]
            basis = tl.load(images, mask=has_place[:, None] & has_element, other=0.0)
            dz = tl.dot(error.to(OPERAND), basis.to(OPERAND), dz, input_precision=PRECISION)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(changed_ptr + offsets, difference(z, dz, slope, ACTIVATION), mask=mask)


def class_block(pre: Tensor, classes: int, blocks: Blocks) -> int | None:
    """Classes that a kernel with these tiles holds for (W F) e; ``None`` where that does not pay.

    It costs a pass of so many samples, in the place of a block of the batch.
    """
    block = max(16, triton.next_power_of_2(classes))
    return block if block <= min(blocks.BLOCK_N, MOST_CLASSES[on_matrix_units(pre)]) else None


def _run(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    feedback: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    activation: str,
    slope: float,
    learning: Learning,
) -> Tensor:
    (batch, outputs), inputs, classes = z.shape, pre.shape[1], change.shape[1]
    in_one_launch = step_blocks(pre, outputs)
    blocks = in_one_launch or forward_blocks(pre)
    block_c = None
    if feedback is not None:
        block_c = class_block(pre, classes, blocks)
        if block_c is None:
            # F e, by the kernel at hand: cuBLAS may not run where torch has to be deterministic.
            change, feedback = pepita_difference(pre, change, feedback, "identity", 0.0), None
    changed = torch.empty_like(z)
    layer = (z, change, feedback, mask, weight, changed, slope)
    shape = {"batch": batch, "classes": classes, **sizes(outputs=outputs, inputs=inputs)}
    constants = {"ACTIVATION": activation, "BLOCK_C": block_c, **products(pre, blocks)}
    if in_one_launch:
        launch(
            change_and_learn_kernel, (triton.cdiv(outputs, blocks.BLOCK_H),), *layer, pre,
            -1 / batch, on=pre, **shape, **learning._asdict(), **constants,
        )  # fmt: skip
        return changed
    grid = (triton.cdiv(batch, blocks.BLOCK_N), triton.cdiv(outputs, blocks.BLOCK_H))
    launch(change_kernel, grid, *layer, on=pre, **shape, **constants)
    learn(changed, pre, -1 / batch, learning)
    return changed


def pepita_linear_step(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    feedback: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    *update: Any,
) -> Tensor:
    """Δh of the old weight, [batch, out]; weight, bias and state updated in place."""
    learning = learn_in_place(weight, bias, update)
    return _run(z, pre, change, feedback, mask, weight, activation, slope, learning)


def pepita_linear_grad(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    feedback: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    activation: str,
    slope: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """Δh, [batch, out]; the gradients are written or added to those given."""
    learning = keep_gradients(grad_weight, grad_bias, accumulate)
    return _run(z, pre, change, feedback, mask, weight, activation, slope, learning)


def pepita_difference(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float
) -> Tensor:
    """f(z + Δz) − f(z), shaped like z [batch, ...]; with a basis, Δz = Σ_c change_c · basis_c."""
    changed = torch.empty_like(z)
    _difference(z, change, basis, activation, slope, changed)
    return changed


def pepita_difference_(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float
) -> None:
    """f(z + Δz) − f(z), written into z [batch, ...]: a program reads its tile before it writes it."""
    _difference(z, change, basis, activation, slope, z)


def _difference(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float, changed: Tensor
) -> None:
    batch, classes, size = z.shape[0], change.shape[1], math.prod(z.shape[1:])
    blocks = DIFFERENCE_BLOCKS
    grid = (triton.cdiv(batch, blocks.BLOCK_N) * triton.cdiv(size, blocks.BLOCK_H),)
    launch(
        difference_kernel, grid, z, change, basis, changed, slope, batch, classes, on=z,
        **sizes(size=size), ACTIVATION=activation, **products(z, blocks),
    )  # fmt: skip
