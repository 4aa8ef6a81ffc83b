"""The output layer in plain PyTorch (equations: `bpfree_kernels.ops.classifier`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.labels import one_hot
from bpfree_kernels.reference.update import store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs


def gradient_scale(loss: str, batch: int, classes: int) -> float:
    """Factor between the error and the gradient of the batch's mean loss at z."""
    by_sample, by_class = 1 / batch, 1 / (batch * classes)
    return {"ce": by_sample, "bce": by_class, "mse": 2 * by_class, "hinge": by_sample}[loss]


def hinge(z: Tensor, labels: Tensor, margin: float, off_class: float) -> tuple[Tensor, Tensor]:
    """Error and multi-class hinge loss of each sample, from the logits z [batch, classes].

    Autograd through the loss gives the error as well: clamp, unlike relu, passes the gradient on at
    its bound.
    """
    target = (labels[:, None] == torch.arange(z.shape[1], device=z.device)).to(z.dtype)
    sign = 1 - 2 * target
    weight = target + off_class * (1 - target)
    slack = margin + sign * z
    error = weight * sign * (slack >= 0)
    return error, (weight * slack.clamp(min=0)).sum(1)


def output_and_loss(
    z: Tensor, labels: Tensor, loss: str, margin: float, off_class: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and the loss of each sample, from the logits z [batch, classes].

    Raises:
        ValueError: an unknown loss.
    """
    if loss == "hinge":
        return z.clone(), *hinge(z, labels, margin, off_class)
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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, error and the loss of each sample."""
    return output_and_loss(F.linear(x, weight, bias), labels, loss, margin, off_class)


def _forward_and_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    outputs = classifier_forward(x, weight, bias, labels, loss, margin, off_class)
    post = outputs[1] * gradient_scale(loss, x.shape[0], weight.shape[0])
    return outputs, post.t() @ x, post.sum(0)


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
    outputs, grad_weight, grad_bias = _forward_and_gradient(
        x, weight, bias, labels, loss, margin, off_class
    )
    update_layer(weight, bias, grad_weight, grad_bias, UpdateArgs(*update[:8]), update[8:])
    return outputs


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
    outputs, of_weight, of_bias = _forward_and_gradient(
        x, weight, bias, labels, loss, margin, off_class
    )
    store_gradient(grad_weight, of_weight, accumulate)
    store_gradient(grad_bias, of_bias, accumulate)
    return outputs
