"""The output layer in plain PyTorch (equations: `bpfree_kernels.ops.classifier`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.labels import one_hot
from bpfree_kernels.reference.update import store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs

LOSSES = ("ce", "bce", "mse")
"""Every loss name of an output layer."""


def gradient_scale(loss: str, batch: int, classes: int) -> float:
    """Factor between the error y − t and the gradient of the batch's mean loss at z."""
    return {"ce": 1 / batch, "bce": 1 / (batch * classes), "mse": 2 / (batch * classes)}[loss]


def output_and_loss(z: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and the loss of each sample, from the logits z [batch, classes].

    Raises:
        ValueError: an unknown loss.
    """
    target = one_hot(labels, z.shape[1], z.dtype)
    if loss == "ce":
        output = torch.softmax(z, 1)
        per_sample = -(torch.log_softmax(z, 1) * target).sum(1)
    elif loss == "bce":
        output = torch.sigmoid(z)
        per_sample = F.binary_cross_entropy_with_logits(z, target, reduction="none").mean(1)
    elif loss == "mse":
        output = z.clone()
        per_sample = (z - target).square().mean(1)
    else:
        raise ValueError(f"unknown loss {loss!r}")
    return output, output - target, per_sample


def classifier_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and the loss of each sample."""
    return output_and_loss(F.linear(x, weight, bias), labels, loss)


def _forward_and_gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    outputs = classifier_forward(x, weight, bias, labels, loss)
    post = outputs[1] * gradient_scale(loss, x.shape[0], weight.shape[0])
    return outputs, post.t() @ x, post.sum(0)


def classifier_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss: str, *update: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and loss of the old weight; weight, bias and state updated in place."""
    outputs, grad_weight, grad_bias = _forward_and_gradient(x, weight, bias, labels, loss)
    update_layer(weight, bias, grad_weight, grad_bias, UpdateArgs(*update[:8]), update[8:])
    return outputs


def classifier_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and loss; the gradients are written or added to those given."""
    outputs, of_weight, of_bias = _forward_and_gradient(x, weight, bias, labels, loss)
    store_gradient(grad_weight, of_weight, accumulate)
    store_gradient(grad_bias, of_bias, accumulate)
    return outputs
