"""EKDAA in plain PyTorch (equations: `bpfree_kernels.ops.ekdaa`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.geometry import Geometry, Pooling
from bpfree_kernels.maps import like_maps
from bpfree_kernels.reference.activations import difference
from bpfree_kernels.reference.conv import input_gradient


def ekdaa_error(change: Tensor, z: Tensor, beta: float, upsample: str, *rest: Any) -> Tensor:
    """f(z) − f(z − β up(d)); `rest` is the pooling, the activation and its slope."""
    *pooling, activation, slope = rest
    shift = upsampled(change, z, upsample, Pooling(*pooling)) * -beta
    return like_maps(-difference(z, shift, activation, slope), z)


def ekdaa_linear_error(
    error: Tensor, feedback: Tensor, z: Tensor, beta: float, activation: str, slope: float
) -> Tensor:
    """f(z) − f(z − β e E)."""
    return -difference(z, (error @ feedback) * -beta, activation, slope)


def ekdaa_conv_error(error: Tensor, feedback: Tensor, z: Tensor, beta: float, *rest: Any) -> Tensor:
    """f(z) − f(z − β up(E ∗ᵀ e)); `rest` is the geometry, and what `ekdaa_error` takes."""
    place, rows, columns = Geometry(*rest[:7]), rest[7], rest[8]
    change = input_gradient(error, feedback, rows, columns, place)
    return ekdaa_error(change, z, beta, *rest[9:])


def upsampled(change: Tensor, z: Tensor, upsample: str, pool: Pooling) -> Tensor:
    """Pooled maps at the size of z.

    Raises:
        ValueError: an unknown up-sampling.
    """
    if z.numel() == 0:
        return torch.zeros_like(z)
    if upsample == "bilinear":
        size = (z.shape[2], z.shape[3])
        return F.interpolate(change, size=size, mode="bilinear", align_corners=False)
    spread = change.unsqueeze(2).expand(-1, -1, pool.kernel_h * pool.kernel_w, -1, -1)
    if upsample == "argmax":
        spread = spread.where(_winners(z, change, pool), 0)
    elif upsample == "average":
        spread = spread / (pool.kernel_h * pool.kernel_w)
    elif upsample != "nearest":
        raise ValueError(f"unknown up-sampling {upsample!r}")
    margins = _margins(z, change, pool)
    left, right, top, bottom = margins
    size = (z.shape[2] + top + bottom, z.shape[3] + left + right)
    columns = spread.flatten(3).flatten(1, 2)
    folded = F.fold(
        columns, size, pool.kernel, (pool.dilation_h, pool.dilation_w), stride=pool.stride
    )
    return F.pad(folded, [-margin for margin in margins])


def _margins(z: Tensor, pooled: Tensor, pool: Pooling) -> tuple[int, int, int, int]:
    """What to add to z so that its windows are just those of the pooled maps: left, right, top, bottom."""
    reach_h = (pooled.shape[2] - 1) * pool.stride_h + pool.dilation_h * (pool.kernel_h - 1) + 1
    reach_w = (pooled.shape[3] - 1) * pool.stride_w + pool.dilation_w * (pool.kernel_w - 1) + 1
    below, right = reach_h - pool.pad_top - z.shape[2], reach_w - pool.pad_left - z.shape[3]
    return pool.pad_left, right, pool.pad_top, below


def _winners(z: Tensor, pooled: Tensor, pool: Pooling) -> Tensor:
    """Which element of a window has its largest z, [batch, channels, elements, rows, columns]."""
    inside = z.clamp(min=torch.finfo(z.dtype).min)  # even -inf wins over what is outside the map
    padded = F.pad(inside, _margins(z, pooled, pool), value=-torch.inf)
    taken = padded.unfold(2, pool.dilation_h * (pool.kernel_h - 1) + 1, pool.stride_h)
    taken = taken[..., :: pool.dilation_h]
    taken = taken.unfold(3, pool.dilation_w * (pool.kernel_w - 1) + 1, pool.stride_w)
    windows = taken[..., :: pool.dilation_w].flatten(4).permute(0, 1, 4, 2, 3)
    first = windows.argmax(2, keepdim=True)
    return torch.zeros_like(windows, dtype=torch.bool).scatter_(2, first, True)
