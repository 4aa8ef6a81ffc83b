"""A dense layer's two halves in plain PyTorch (equations: `bpfree_kernels.ops.dense`)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.activations import activate
from bpfree_kernels.reference.update import apply_rule, store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs


def dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """z = W x + b and f(z)."""
    z = F.linear(x, weight, bias)
    return z, activate(z, activation, slope)[0]


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
    rule, state = UpdateArgs(*update[:8]), update[8:]
    grad = scale * (post.t() @ pre)
    update_layer(weight, bias, grad, scale * post.sum(0), rule, state)
    if feedback is not None:
        apply_rule(feedback, feedback_scale * grad, *rule, *state[6:])


def dense_grad(
    post: Tensor,
    pre: Tensor,
    scale: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    accumulate: bool,
) -> None:
    """The gradients, written or added to those given."""
    store_gradient(grad_weight, scale * (post.t() @ pre), accumulate)
    store_gradient(grad_bias, scale * post.sum(0), accumulate)
