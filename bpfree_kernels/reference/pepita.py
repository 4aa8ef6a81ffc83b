"""PEPITA in plain PyTorch (equations: `bpfree_kernels.ops.pepita`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.activations import difference
from bpfree_kernels.reference.dense import dense_grad
from bpfree_kernels.reference.update import update_layer
from bpfree_kernels.update import UpdateArgs


def pepita_difference(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float
) -> Tensor:
    """f(z + Δz) − f(z), shaped like z."""
    if basis is not None:
        change = torch.einsum("nc,c...->n...", change, basis)
    return difference(z, change, activation, slope)


def pepita_difference_(
    z: Tensor, change: Tensor, basis: Tensor | None, activation: str, slope: float
) -> None:
    """f(z + Δz) − f(z), written into z."""
    z.copy_(pepita_difference(z, change, basis, activation, slope))


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
    rule, state = UpdateArgs(*update[:8]), update[8:]
    scale = -1 / z.shape[0]
    update_layer(weight, bias, scale * (changed.t() @ pre), scale * changed.sum(0), rule, state)
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


def pepita_max_pool(
    y: Tensor,
    change: Tensor | None,
    rows: int,
    columns: int,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_top: int,
    pad_left: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    """The pooled maps of y [outer, height, width, inner], or with Δy their change."""

    def windows(maps: Tensor, outside: float) -> Tensor:
        """[outer, rows, columns, inner, elements of the window]"""
        below = (rows - 1) * stride_h + dilation_h * (kernel_h - 1) + 1 - pad_top - maps.shape[1]
        right = (
            (columns - 1) * stride_w + dilation_w * (kernel_w - 1) + 1 - pad_left - maps.shape[2]
        )
        sides = (0, 0, pad_left, max(right, 0), pad_top, max(below, 0))
        padded = F.pad(maps, sides, value=outside)
        taken = padded.unfold(1, dilation_h * (kernel_h - 1) + 1, stride_h)[..., ::dilation_h]
        taken = taken.unfold(2, dilation_w * (kernel_w - 1) + 1, stride_w)[..., ::dilation_w]
        return taken[:, :rows, :columns].flatten(4)

    before = windows(y, -torch.inf)
    pooled = before.amax(4)
    if change is None:
        return pooled
    wide = torch.promote_types(y.dtype, torch.float32)
    step = windows(change, 0.0).to(wide)
    now = (before.to(wide) + step).argmax(4, keepdim=True)
    moved = before.gather(4, now)[..., 0].to(wide) - pooled.to(wide)
    return (step.gather(4, now)[..., 0] + moved).to(y.dtype)
