"""Invertible convolutions: a patch from its outputs, and an error carried down by the inverse (GAIT-prop).

A convolution with as many outputs as its window has values, out = in · kernel_h · kernel_w, has a square
weight M when it is taken as [out, in · kernel_h · kernel_w]: every position tells its whole patch. With
a = f(z), z = W ∗ x + b and ∗ᵀ the transposed convolution::

    reconstruction   x̂ = W⁻ᵀ ∗ᵀ (f⁻¹(u) − b) − (n − 1) ⊙ x,   u = a + γ f′² (t − a)   (Dalm et al., 2021)
    error            δ_x = (W⁻ᵀ ∗ᵀ δ) ⊙ f′(z_x)

W⁻ᵀ is the inverse of Mᵀ in W's shape, n how many windows hold a value of x, which the geometry tells: where
patches overlap, each brings the whole value. With the target t = a it returns x; the learning rate γ nudges
the output towards the target. The error is the difference t̂ − x without the digits that subtracting would
lose: backpropagation with W⁻ᵀ in the place of W. `bpfree_kernels.invert` makes W⁻ᵀ; a dense layer is a
convolution of 1 × 1 maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.geometry import GEOMETRY_SCHEMA, Geometry, pair, same_margins
from bpfree_kernels.maps import as_maps, map_order
from bpfree_kernels.ops._define import define
from bpfree_kernels.ops.conv import check_conv
from bpfree_kernels.reference import invertible_conv as reference

Ints = int | Sequence[int]

INVERTIBLE_ACTIVATIONS = ("identity", "leaky_relu")
"""The activations that have an inverse everywhere."""


def _fake_reconstruct(output: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _fake_error(
    signal: Tensor, inverse: Tensor, gate: Tensor | None, height: int, width: int, *_: object
) -> Tensor:
    shape = (signal.shape[0], inverse.shape[1], height, width)
    order = map_order(signal if gate is None else gate)
    return signal.new_empty(shape).contiguous(memory_format=order)


define(
    "invertible_conv_reconstruct",
    "(Tensor output, Tensor x, Tensor inverse, Tensor? bias, Tensor? target, Tensor? rate, "
    f"{GEOMETRY_SCHEMA}, str activation, float slope) -> Tensor",
    reference=reference.invertible_conv_reconstruct,
    fake=_fake_reconstruct,
)
define(
    "invertible_conv_error",
    "(Tensor signal, Tensor inverse, Tensor? gate, int height, int width, "
    f"{GEOMETRY_SCHEMA}, str activation, float slope) -> Tensor",
    reference=reference.invertible_conv_error,
    fake=_fake_error,
)


@torch.no_grad()
def invertible_conv_reconstruct(
    output: Tensor,
    x: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    *,
    target: Tensor | None = None,
    rate: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    activation: str = "leaky_relu",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reconstruct a convolution's input from its output, or from one nudged towards a target.

    Args:
        output: a = f(W ∗ x + b) of all outputs, [batch, out, out_height, out_width]; the batch may be empty.
        x: the input, [batch, in, height, width]; what overlapping patches bring too often is taken off it,
            and what no window holds comes from it.
        inverse: W⁻ᵀ, [out, in, kernel_h, kernel_w] with out = in · kernel_h · kernel_w.
        bias: b, [out], or ``None``.
        target: t, shaped like `output`; with `rate`.
        rate: γ of each sample, [batch].
        stride, dilation: as `torch.nn.Conv2d` has them.
        padding: zeros around the map: an int, a pair (height, width), ``"valid"``, or ``"same"`` as
            TensorFlow has it: ⌈size / stride⌉ positions, what is odd below and on the right.
        activation: f, ``"leaky_relu"`` or ``"identity"``.
        slope: of ``leaky_relu``.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Returns:
        x̂, shaped like `x` and in its order in memory.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an activation without an inverse, or a target
            without a rate.
        RuntimeError: a backend that cannot run here.
    """
    _check_maps("x", x, "[batch, in, height, width]")
    name, parameter = resolve_invertible(activation, slope)
    size = (x.shape[2], x.shape[3])
    place, gives = invertible_place((x.shape[1], *size), inverse, stride, padding, dilation)
    checks.same_kind("inverse", inverse, "x", x)
    checks.shape("output", output, (x.shape[0], *gives), "[batch, out, out_height, out_width]")
    checks.same_kind("output", output, "x", x)
    if inverse.shape[0] != inverse[0].numel():
        raise ValueError(
            "inverse must have as many outputs as its window has values, got shape "
            f"{tuple(inverse.shape)}."
        )
    if bias is not None:
        checks.shape("bias", bias, (inverse.shape[0],), "[out]")
        checks.same_kind("bias", bias, "x", x)
    if (target is None) != (rate is None):
        raise ValueError("target and rate belong together, but one of them is None.")
    if target is not None and rate is not None:
        checks.like("target", target, "output", output)
        checks.shape("rate", rate, (x.shape[0],), "[batch]")
        checks.same_kind("rate", rate, "x", x)
        target, rate = as_maps(target), rate.contiguous()
    body = backends.body("invertible_conv_reconstruct", x.device.type, backend)
    read = (as_maps(output), as_maps(x), inverse.contiguous())
    bias = None if bias is None else bias.contiguous()
    return cast(Tensor, body(*read, bias, target, rate, *place, name, parameter))


@torch.no_grad()
def invertible_conv_error(
    signal: Tensor,
    inverse: Tensor,
    input_size: Sequence[int],
    *,
    gate: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    activation: str = "leaky_relu",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Carry an error at a convolution's z down by the inverse of its weight, in the difference form.

    Equivalent to ``F.conv_transpose2d(signal, inverse, ...)`` at the input's size, times f′(gate).

    Args:
        signal: δ of the outputs that have one, [batch, features, out_height, out_width]; those of all
            others, the auxiliary ones, are 0. The batch may be empty.
        inverse: their part of W⁻ᵀ, [features, in, kernel_h, kernel_w].
        input_size: height and width of the input.
        gate: z of the units that are the input, [batch, in, height, width]; ``None``: no derivative.
        stride, padding, dilation, backend: as in `invertible_conv_reconstruct`.
        activation: f of those units (see `bpfree_kernels.activations`); read only with `gate`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.

    Returns:
        The error at the units below, [batch, in, height, width], in the order in memory of `gate`, or
        without one of `signal`.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    _check_maps("signal", signal, "[batch, features, out_height, out_width]")
    size = pair("input_size", input_size, 1)
    checks.dims("inverse", inverse, 4, "[features, in, kernel_h, kernel_w]")
    place, gives = invertible_place((inverse.shape[1], *size), inverse, stride, padding, dilation)
    checks.same_kind("inverse", inverse, "signal", signal)
    shape = (signal.shape[0], *gives)
    checks.shape("signal", signal, shape, "[batch, features, out_height, out_width]")
    name, parameter = "identity", 0.0
    if gate is not None:
        name, parameter = resolve_activation(activation, slope)
        below = (signal.shape[0], inverse.shape[1], *size)
        checks.shape("gate", gate, below, "[batch, in, height, width]")
        checks.same_kind("gate", gate, "signal", signal)
        gate = as_maps(gate)
    body = backends.body("invertible_conv_error", signal.device.type, backend)
    read = (as_maps(signal), inverse.contiguous(), gate)
    return cast(Tensor, body(*read, *size, *place, name, parameter))


def resolve_invertible(activation: str, slope: float | None) -> tuple[str, float]:
    """`resolve_activation` of an activation that has an inverse; ValueError for one that has none."""
    name, parameter = resolve_activation(activation, slope)
    if name not in INVERTIBLE_ACTIVATIONS:
        known = ", ".join(map(repr, INVERTIBLE_ACTIVATIONS))
        raise ValueError(f"activation must have an inverse, as {known} have, got {activation!r}.")
    return name, parameter


def invertible_place(
    entering: tuple[int, int, int],
    inverse: Tensor,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
) -> tuple[Geometry, tuple[int, int, int]]:
    """Where the windows lie, as `check_conv` says it, with TensorFlow's ``"same"``."""
    if padding != "same":
        return check_conv(entering, inverse, stride, padding, dilation, 1, name="inverse")
    checks.dims("inverse", inverse, 4, "[out, in, kernel_h, kernel_w]")
    size, kernel = (entering[1], entering[2]), (inverse.shape[2], inverse.shape[3])
    margins = same_margins(size, kernel, stride, dilation)
    padded = (entering[0], *(n + sum(m) for n, m in zip(size, margins, strict=True)))
    place, gives = check_conv(
        cast(tuple[int, int, int], padded), inverse, stride, 0, dilation, 1, name="inverse"
    )
    return place._replace(pad_top=margins[0][0], pad_left=margins[1][0]), gives


def _check_maps(name: str, maps: Tensor, meaning: str) -> None:
    checks.tensor(name, maps)
    if maps.dtype != torch.float64:  # which here GPUs take, too: the literal form needs it
        checks.floating(name, maps)
    checks.dims(name, maps, 4, meaning)
