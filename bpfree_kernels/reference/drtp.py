"""DRTP in plain PyTorch (equations: `bpfree_kernels.ops.drtp`)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.activations import activate
from bpfree_kernels.reference.labels import gather_rows
from bpfree_kernels.reference.update import store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs


def drtp_signal(
    z: Tensor, feedback: Tensor, labels: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """f(z) and B[label] ⊙ f′(z), both shaped like z."""
    y, derivative = activate(z, activation, slope)
    return y, gather_rows(feedback, labels) * derivative


def _forward_and_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    y, post = drtp_signal(z, feedback, labels, activation, slope)
    return y, post.t() @ x, post.sum(0)


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
    """The fused dense step: output of the old weight; weight, bias and state updated in place."""
    y, grad_weight, grad_bias = _forward_and_gradient(
        x, weight, bias, feedback, labels, activation, slope
    )
    update_layer(weight, bias, grad_weight, grad_bias, UpdateArgs(*update[:8]), update[8:])
    return y


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
    """The dense step's output; its gradients are written or added to those given."""
    y, of_weight, of_bias = _forward_and_gradient(
        x, weight, bias, feedback, labels, activation, slope
    )
    store_gradient(grad_weight, of_weight, accumulate)
    store_gradient(grad_bias, of_bias, accumulate)
    return y
