"""DRTP in Triton (equations: `bpfree_kernels.ops.drtp`).

A batch that fits into one block takes one launch: a program owns a few rows of the weight, runs them
forward, turns their output into the signal and updates them. A larger batch takes two: forward and
signal, then the update kernel of dense layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.activations import activate
from bpfree_kernels.triton.dense import (
    forward_blocks,
    learn,
    linear_tile,
    step_blocks,
    update_rows,
)
from bpfree_kernels.triton.labels import gather_rows, load_labels
from bpfree_kernels.triton.launch import launch, products, sizes
from bpfree_kernels.triton.optimizers import Learning, keep_gradients, learn_in_place

SIGNAL_BLOCKS = {"vectors": (16, 64), "maps": (1, 1024)}
"""Tiles (samples, elements of a sample) of `drtp_signal`."""


@triton.jit
def _forward_and_signal(
    x_ptr, weight_ptr, bias_ptr, feedback_ptr, labels_ptr, y_ptr, slope, samples, units,
    batch, classes, outputs, inputs,
    ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store f(x Wᵀ + b) of some samples and units; their signal B[label] ⊙ f′, float32."""
    z = linear_tile(
        x_ptr, weight_ptr, bias_ptr, samples, units, batch, outputs, inputs,
        BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    y, derivative = activate(z, slope, ACTIVATION)
    offsets = samples.to(tl.int64)[:, None] * outputs + units[None, :]
    tl.store(y_ptr + offsets, y, mask=(samples < batch)[:, None] & (units < outputs)[None, :])
    labels = load_labels(labels_ptr, samples, batch, classes)
    return gather_rows(feedback_ptr, labels, units, outputs) * derivative


@triton.jit(do_not_specialize=["batch", "outputs", "inputs", "classes"])
def step_kernel(
    x_ptr, weight_ptr, bias_ptr, feedback_ptr, labels_ptr, y_ptr, slope,
    batch, classes, outputs, inputs, weight, bias, rule,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Forward, signal and update of BLOCK_H rows of the weight, for the whole batch."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    samples = tl.arange(0, BLOCK_N)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    post = _forward_and_signal(
        x_ptr, weight_ptr, bias_ptr, feedback_ptr, labels_ptr, y_ptr, slope, samples, units,
        batch, classes, outputs, inputs, ACTIVATION, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    update_rows(
        post, 1.0, x_ptr, weight, bias, rule, samples, units, batch, outputs, inputs,
        EPILOGUE, BLOCK_K, OPERAND, PRECISION, num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "outputs", "inputs", "classes"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, feedback_ptr, labels_ptr, y_ptr, post_ptr, slope,
    batch, classes, outputs, inputs, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUTS_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward and signal of a tile, for a batch that needs several."""
    outputs *= OUTPUTS_BY
    inputs *= INPUTS_BY
    samples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    post = _forward_and_signal(
        x_ptr, weight_ptr, bias_ptr, feedback_ptr, labels_ptr, y_ptr, slope, samples, units,
        batch, classes, outputs, inputs, ACTIVATION, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    offsets = samples.to(tl.int64)[:, None] * outputs + units[None, :]
    tl.store(post_ptr + offsets, post, mask=(samples < batch)[:, None] & (units < outputs)[None, :])


@triton.jit(do_not_specialize=["batch", "classes", "size"])
def signal_kernel(
    z_ptr, feedback_ptr, labels_ptr, y_ptr, post_ptr, slope, batch, classes, size,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, SIZE_BY: tl.constexpr,
):  # fmt: skip
    """f(z) and B[label] ⊙ f′(z) of a tile (samples, elements of a sample)."""
    size *= SIZE_BY
    samples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    elements = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets = samples.to(tl.int64)[:, None] * size + elements[None, :]
    mask = (samples < batch)[:, None] & (elements < size)[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y, derivative = activate(z, slope, ACTIVATION)
    tl.store(y_ptr + offsets, y, mask=mask)
    labels = load_labels(labels_ptr, samples, batch, classes)
    post = gather_rows(feedback_ptr, labels, elements, size) * derivative
    tl.store(post_ptr + offsets, post, mask=mask)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float,
    learning: Learning,
) -> Tensor:
    (batch, inputs), (classes, outputs) = x.shape, feedback.shape
    y = x.new_empty(batch, outputs)
    layer = (x, weight, bias, feedback, labels, y)
    shape = {"batch": batch, "classes": classes, **sizes(outputs=outputs, inputs=inputs)}
    blocks = step_blocks(x, outputs)
    if blocks is not None:
        launch(
            step_kernel, (triton.cdiv(outputs, blocks.BLOCK_H),), *layer, slope, on=x,
            **shape, **learning._asdict(), ACTIVATION=activation, **products(x, blocks),
        )  # fmt: skip
        return y
    blocks = forward_blocks(x)
    grid = (triton.cdiv(batch, blocks.BLOCK_N), triton.cdiv(outputs, blocks.BLOCK_H))
    post = torch.empty_like(y)
    launch(
        forward_kernel, grid, *layer, post, slope, on=x,
        **shape, ACTIVATION=activation, **products(x, blocks),
    )  # fmt: skip
    learn(post, x, 1.0, learning)
    return y


def drtp_linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float,
    *update: Any,
) -> Tensor:
    """Output of the old weight, [batch, out]; weight, bias and state updated in place."""
    learning = learn_in_place(weight, bias, update)
    return _run(x, weight, bias, feedback, labels, activation, slope, learning)


def drtp_linear_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """Output, [batch, out]; the gradients are written or added to those given."""
    learning = keep_gradients(grad_weight, grad_bias, accumulate)
    return _run(x, weight, bias, feedback, labels, activation, slope, learning)


def drtp_signal(
    z: Tensor, feedback: Tensor, labels: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """f(z) and B[label] ⊙ f′(z), both shaped like z [batch, ...]."""
    y, post = torch.empty_like(z), torch.empty_like(z)
    batch, classes = z.shape[0], feedback.shape[0]
    size = math.prod(z.shape[1:])
    block_n, block_p = SIGNAL_BLOCKS["vectors" if size < 512 else "maps"]
    grid = (triton.cdiv(batch, block_n), triton.cdiv(size, block_p))
    launch(
        signal_kernel, grid, z, feedback, labels, y, post, slope, batch, classes, on=z,
        **sizes(size=size), ACTIVATION=activation, BLOCK_N=block_n, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return y, post
