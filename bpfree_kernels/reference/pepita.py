"""PEPITA in plain PyTorch (equations: `bpfree_kernels.ops.pepita`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.activations import difference
from bpfree_kernels.reference.dense import dense_grad, dense_step


def pepita_difference(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float
) -> Tensor:
    """f(z + Δz) − f(z), shaped like z."""
    if basis is not None:
        change = torch.einsum("nc,c...->n...", change, basis)
    return difference(z, change, activation, slope)


def _change_of_output(
    z: Tensor,
    change: Tensor,
    feedback: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    activation: str,
    slope: float,
) -> Tensor:
    change = change if feedback is None else change @ feedback
    changed = difference(z, F.linear(change, weight), activation, slope)
    return changed if mask is None else changed * mask


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
    """Δh of the old weight; weight, bias and state updated in place. `feedback` is [classes, in]."""
    changed = _change_of_output(z, change, feedback, mask, weight, activation, slope)
    dense_step(changed, pre, weight, bias, -1 / z.shape[0], *update)
    return changed


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
    """Δh; the gradients are written or added to those given. `feedback` is [classes, in]."""
    changed = _change_of_output(z, change, feedback, mask, weight, activation, slope)
    dense_grad(changed, pre, -1 / z.shape[0], grad_weight, grad_bias, accumulate)
    return changed
