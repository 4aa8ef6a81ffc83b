"""The output layer in Triton (equations: `bpfree_kernels.ops.classifier`).

Up to 128 classes the logits of a few samples fit into one block, which goes on to output, error and loss
in the same launch. More classes take a launch for the logits and one for their rows. The update kernel of
dense layers follows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.reference.classifier import gradient_scale
from bpfree_kernels.triton.dense import learn, linear, linear_tile
from bpfree_kernels.triton.labels import load_labels
from bpfree_kernels.triton.launch import Blocks, launch, on_matrix_units, products, sizes
from bpfree_kernels.triton.optimizers import Learning, keep_gradients, learn_in_place

FEW_CLASSES_BLOCKS = {
    # On matrix units? All classes are in one block; 16 samples make many programs of a small batch.
    True: (Blocks(16, 16, 128, 4, 3), Blocks(16, 128, 64, 8, 3)),
    False: (Blocks(16, 16, 128, 4, 3), Blocks(16, 128, 32, 8, 3)),
}
"""Tiles of logits, output, error and loss in one launch."""

ROW_BLOCK = 1024
"""Classes that the row kernel holds at a time."""


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], without the digits that the sum drops: they come back as u / (w − 1)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _output_tile(z, is_label, peak, total, margin, off_class, LOSS: tl.constexpr):
    """Output, error and terms of the loss of a float32 tile of logits.

    `peak` and `total` are each sample's largest logit and Σ e^(z − peak), which softmax needs;
    margin and off_class are those of the hinge loss.
    """
    target = tl.where(is_label, 1.0, 0.0)
    y = z
    if LOSS == "ce":
        shifted = z - peak
        y = tl.exp(shifted) / total
        terms = tl.where(is_label, tl.log(total) - shifted, 0.0)
    elif LOSS == "bce":
        decay = tl.exp(-tl.abs(z))
        y = tl.where(z < 0.0, decay, 1.0) / (1.0 + decay)
        terms = tl.where(is_label, tl.maximum(-z, 0.0), tl.maximum(z, 0.0)) + _log1p(decay)
    elif LOSS == "mse":
        terms = (z - target) * (z - target)
    else:
        tl.static_assert(LOSS == "hinge", "unknown loss")
        slack = margin + tl.where(is_label, -z, z)
        terms = tl.where(slack < 0.0, 0.0, slack) * tl.where(is_label, 1.0, off_class)
        error = tl.where(slack >= 0.0, tl.where(is_label, -1.0, off_class), 0.0)
    if LOSS != "hinge":
        error = y - target
    return y, error, terms


@triton.jit
def _of_sample(total, classes, LOSS: tl.constexpr):
    """Loss of a sample from the sum of its terms; ``bce`` and ``mse`` take the mean over classes."""
    if LOSS == "bce" or LOSS == "mse":
        total /= classes
    return total


@triton.jit(do_not_specialize=["batch", "classes", "inputs"])
def few_classes_kernel(
    x_ptr, weight_ptr, bias_ptr, labels_ptr, y_ptr, error_ptr, loss_ptr, margin, off_class,
    batch, classes, inputs,
    LOSS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    CLASSES_BY: tl.constexpr, INPUTS_BY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, output, error and loss of BLOCK_N samples, all classes in one block."""
    classes *= CLASSES_BY
    inputs *= INPUTS_BY
    samples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_H)
    z = linear_tile(
        x_ptr, weight_ptr, bias_ptr, samples, units, batch, classes, inputs,
        BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    has_class = (units < classes)[None, :]
    labels = load_labels(labels_ptr, samples, batch, classes)
    peak = 0.0
    total = 1.0
    if LOSS == "ce":
        z = tl.where(has_class, z, float("-inf"))
        peak = tl.max(z, 1)[:, None]
        total = tl.sum(tl.exp(z - peak), 1)[:, None]
    is_label = labels[:, None] == units[None, :]
    y, error, terms = _output_tile(z, is_label, peak, total, margin, off_class, LOSS)
    has_sample = samples < batch
    offsets = samples.to(tl.int64)[:, None] * classes + units[None, :]
    mask = has_sample[:, None] & has_class
    tl.store(y_ptr + offsets, y, mask=mask)
    tl.store(error_ptr + offsets, error, mask=mask)
    loss = _of_sample(tl.sum(tl.where(has_class, terms, 0.0), 1), classes, LOSS)
    tl.store(loss_ptr + samples, loss, mask=has_sample)


@triton.jit(do_not_specialize=["batch", "classes"])
def row_kernel(
    z_ptr, labels_ptr, y_ptr, error_ptr, loss_ptr, margin, off_class, batch, classes,
    LOSS: tl.constexpr, BLOCK: tl.constexpr, CLASSES_BY: tl.constexpr,
):  # fmt: skip
    """Output, error and loss of one sample from its logits, a block of classes at a time."""
    classes *= CLASSES_BY
    sample = tl.program_id(0)
    row = sample.to(tl.int64) * classes
    label = load_labels(labels_ptr, sample, batch, classes)
    peak = 0.0
    total = 1.0
    if LOSS == "ce":
        peaks = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, classes, BLOCK):
            units = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row + units, mask=units < classes, other=float("-inf"))
            peaks = tl.maximum(peaks, z)
        peak = tl.max(peaks, 0)
        totals = tl.zeros([BLOCK], tl.float32)
        for start in range(0, classes, BLOCK):
            units = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row + units, mask=units < classes, other=float("-inf"))
            totals += tl.exp(z - peak)
        total = tl.sum(totals, 0)
    losses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        units = start + tl.arange(0, BLOCK)
        mask = units < classes
        z = tl.load(z_ptr + row + units, mask=mask, other=0.0)
        y, error, terms = _output_tile(z, label == units, peak, total, margin, off_class, LOSS)
        tl.store(y_ptr + row + units, y, mask=mask)
        tl.store(error_ptr + row + units, error, mask=mask)
        losses += tl.where(mask, terms, 0.0)
    tl.store(loss_ptr + sample, _of_sample(tl.sum(losses, 0), classes, LOSS))


def classifier_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and error [batch, classes] and loss [batch]."""
    batch, inputs = x.shape
    classes = weight.shape[0]
    y = x.new_empty(batch, classes)
    outputs = y, torch.empty_like(y), x.new_empty(batch)
    shape = {"batch": batch, **sizes(classes=classes, inputs=inputs)}
    for blocks in FEW_CLASSES_BLOCKS[on_matrix_units(x)]:
        if classes <= blocks.BLOCK_H:
            grid = (triton.cdiv(batch, blocks.BLOCK_N),)
            launch(
                few_classes_kernel, grid, x, weight, bias, labels, *outputs,
                margin, off_class, on=x, **shape, LOSS=loss, **products(x, blocks),
            )  # fmt: skip
            return outputs
    z = torch.empty_like(y, dtype=torch.float32)
    linear(x, weight, bias, z)
    launch(
        row_kernel, (batch,), z, labels, *outputs, margin, off_class, batch, on=x,
        **sizes(classes=classes), LOSS=loss, BLOCK=ROW_BLOCK, num_warps=4,
    )  # fmt: skip
    return outputs


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
    learning: Learning,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = classifier_forward(x, weight, bias, labels, loss, margin, off_class)
    learn(outputs[1], x, gradient_scale(loss, *outputs[0].shape), learning)
    return outputs


def classifier_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
    *update: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and loss of the old weight; weight, bias and state updated in place."""
    learning = learn_in_place(weight, bias, update)
    return _run(x, weight, bias, labels, loss, margin, off_class, learning)


def classifier_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and loss; the gradients are written or added to those given."""
    learning = keep_gradients(grad_weight, grad_bias, accumulate)
    return _run(x, weight, bias, labels, loss, margin, off_class, learning)
