"""Activations and their slopes in plain PyTorch (see `bpfree_kernels.activations`)."""

from __future__ import annotations

import torch
from torch import Tensor


def value(z: Tensor, activation: str, slope: float) -> Tensor:
    """f(z), a tensor of its own.

    Raises:
        ValueError: an unknown activation.
    """
    if activation == "identity":
        return z.clone()
    if activation == "relu":
        return z.relu()
    if activation == "leaky_relu":
        return torch.where(z > 0, z, slope * z)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    if activation == "hardtanh":
        return (slope * z).clamp(-1, 1)
    if activation == "sign":
        return torch.sign(z).where(~z.isnan(), z)  # torch.sign drops NaN
    raise ValueError(f"unknown activation {activation!r}")


def activate(z: Tensor, activation: str, slope: float) -> tuple[Tensor, Tensor]:
    """f(z) and f′(z), both shaped like z.

    Raises:
        ValueError: an unknown activation.
    """
    y = value(z, activation, slope)
    if activation == "identity":
        return y, torch.ones_like(z)
    if activation == "relu":
        return y, (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return y, torch.full_like(z, slope).masked_fill(z > 0, 1.0)
    if activation == "tanh":
        return y, 1 - y * y
    if activation == "sigmoid":
        return y, y * (1 - y)
    if activation == "hardtanh":
        return y, slope * ((slope * z).abs() <= 1).to(z.dtype)
    return y, torch.zeros_like(z)  # sign


def difference(z: Tensor, change: Tensor, activation: str, slope: float) -> Tensor:
    """f(z + Δz) − f(z) without the digits that subtracting two close values would lose.

    In float32 or better, rounded once to the dtype of z.

    Raises:
        ValueError: an unknown activation.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    return _difference(z.to(wide), change.to(wide), activation, slope).to(z.dtype)


def _difference(z: Tensor, change: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "identity":
        return change.clone()
    if activation in ("relu", "leaky_relu"):
        low = slope if activation == "leaky_relu" else 0.0
        after = z + change
        stays_on = (z > 0) & (after > 0)
        crosses = torch.where(after > 0, after, low * after) - torch.where(z > 0, z, low * z)
        stays_off = (z <= 0) & (after <= 0)
        return torch.where(stays_on, change, torch.where(stays_off, low * change, crosses))
    if activation == "tanh":
        return _tanh_difference(z, change)
    if activation == "sigmoid":  # sigmoid z = (1 + tanh(z / 2)) / 2
        return _tanh_difference(z / 2, change / 2) / 2
    if activation == "hardtanh":
        # f(z) lies off slope·z by what was clipped; the sum of that and the step, between the bounds.
        scaled = slope * z
        y = scaled.clamp(-1, 1)
        return torch.minimum(torch.maximum((scaled - y) + slope * change, -1 - y), 1 - y)
    if activation == "sign":
        return value(z + change, "sign", 0.0) - value(z, "sign", 0.0)
    raise ValueError(f"unknown activation {activation!r}")


def _tanh_difference(z: Tensor, change: Tensor) -> Tensor:
    """tanh(z + d) − tanh z = u (1 − t²) / (1 + t u) with t = tanh z, u = tanh d, for small d."""
    t, u = torch.tanh(z), torch.tanh(change)
    # A large step loses nothing by plain subtraction, and could divide 0 by 0 here.
    small = change.abs() < 0.5
    exact = u * (1 - t * t) / torch.where(small, 1 + t * u, 1.0)
    return torch.where(small, exact, torch.tanh(z + change) - t)
