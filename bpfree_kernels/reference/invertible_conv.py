"""Invertible convolutions in plain PyTorch (equations: `bpfree_kernels.ops.invertible_conv`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpfree_kernels.geometry import Geometry
from bpfree_kernels.maps import like_maps
from bpfree_kernels.reference.activations import activate
from bpfree_kernels.reference.conv import input_gradient


def invertible_conv_reconstruct(
    output: Tensor,
    x: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    rate: Tensor | None,
    *rest: Any,
) -> Tensor:
    """x̂; `rest` is the geometry, the activation and its slope."""
    place, activation, slope = Geometry(*rest[:7]), rest[7], rest[8]
    u = output
    if target is not None and rate is not None:
        # f' by the sign of f: both activations that are allowed keep it
        derivative = activate(output, activation, slope)[1]
        u = output + rate.view(-1, 1, 1, 1) * derivative * derivative * (target - output)
    z = inverse_activation(u, activation, slope)
    if bias is not None:
        z = z - bias.view(-1, 1, 1)
    height, width = x.shape[2:]
    patches = input_gradient(z, inverse, height, width, place)
    ones = torch.ones_like(inverse[:1, :1])
    times = input_gradient(torch.ones_like(output[:1, :1]), ones, height, width, place)
    return like_maps(patches - (times - 1) * x, x)


def invertible_conv_error(
    signal: Tensor, inverse: Tensor, gate: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    """(W⁻ᵀ ∗ᵀ δ) ⊙ f′(gate); `rest` is the geometry, the activation and its slope."""
    place, activation, slope = Geometry(*rest[:7]), rest[7], rest[8]
    error = input_gradient(signal, inverse, height, width, place)
    if gate is None:
        return like_maps(error, signal)
    return like_maps(error * activate(gate, activation, slope)[1], gate)


def inverse_activation(y: Tensor, activation: str, slope: float) -> Tensor:
    """f⁻¹(y).

    Raises:
        ValueError: an activation without an inverse.
    """
    if activation == "identity":
        return y
    if activation == "leaky_relu":
        return torch.where(y > 0, y, y / slope)
    raise ValueError(f"activation {activation!r} has no inverse")
