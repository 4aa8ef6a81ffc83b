"""Activations and their slopes in plain PyTorch (see `bpfree_kernels.activations`)."""

from __future__ import annotations

import torch
from torch import Tensor


def activate(z: Tensor, activation: str, slope: float) -> tuple[Tensor, Tensor]:
    """f(z) and f′(z), both shaped like z.

    Raises:
        ValueError: an unknown activation.
    """
    if activation == "identity":
        return z.clone(), torch.ones_like(z)
    if activation == "relu":
        return z.relu(), (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        gain = torch.full_like(z, slope).masked_fill(z > 0, 1.0)
        return z * gain, gain
    if activation == "tanh":
        y = torch.tanh(z)
        return y, 1 - y * y
    if activation == "sigmoid":
        y = torch.sigmoid(z)
        return y, y * (1 - y)
    if activation == "hardtanh":
        scaled = slope * z
        return scaled.clamp(-1, 1), slope * (scaled.abs() <= 1).to(z.dtype)
    if activation == "sign":
        return torch.sign(z).where(~z.isnan(), z), torch.zeros_like(z)  # torch.sign drops NaN
    raise ValueError(f"unknown activation {activation!r}")
