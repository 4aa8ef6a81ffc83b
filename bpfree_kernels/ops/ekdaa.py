"""EKDAA: error kernels drive activation alignment (Zee, Ororbia, Mali and Nwogu, 2023).

Every layer has, beside its weight W, an error kernel E of the same shape. The error e of a layer's units
comes down through E, and shifts the units below: their target y is what they would have been. With z the
pre-activation (the paper's h), f the activation, and ∗ᵀ a transposed convolution, or E's own matrix product
in a dense layer::

    d = E ∗ᵀ e,   y = f(z − β d),   e_below = f(z) − y

No derivative of f is used anywhere, so that f may be ``sign``. Where f(z) was max-pooled on its way up, d is
pooled maps, and goes back to the map's size first (`upsample`): to each window's winner, the largest z
(``argmax``); to every unit of the window (``nearest``), or divided by how many they are (``average``); or by
interpolation (``bilinear``, in the reference body alone). Of equal values the first wins, as in torch.

e_below is formed as a difference, without the digits that subtracting f(z) and y would lose; for tanh by
tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b). What W and E learn from e: `conv_step`, `dense_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.geometry import GEOMETRY_SCHEMA, POOLING_SCHEMA, MaxPool
from bpfree_kernels.maps import as_maps
from bpfree_kernels.ops._define import define
from bpfree_kernels.ops.conv import check_conv
from bpfree_kernels.reference import ekdaa as reference

Ints = int | Sequence[int]

UPSAMPLINGS = ("argmax", "nearest", "average", "bilinear")
"""How an error comes back through a max pooling."""

_NO_POOLING = MaxPool(1)  # every window one unit, which wins


def _fake(_: Tensor, feedback_or_z: Tensor, *rest: object) -> Tensor:
    z = next((t for t in rest if isinstance(t, Tensor)), feedback_or_z)
    return torch.empty_like(z)


define(
    "ekdaa_error",
    f"(Tensor change, Tensor z, float beta, str upsample, {POOLING_SCHEMA}, "
    "str activation, float slope) -> Tensor",
    reference=reference.ekdaa_error,
    fake=_fake,
    triton_module="bpfree_kernels.triton.ekdaa",
)
define(
    "ekdaa_linear_error",
    "(Tensor error, Tensor feedback, Tensor z, float beta, str activation, float slope) -> Tensor",
    reference=reference.ekdaa_linear_error,
    fake=_fake,
    triton_module="bpfree_kernels.triton.ekdaa",
)
define(
    "ekdaa_conv_error",
    f"(Tensor error, Tensor feedback, Tensor z, float beta, {GEOMETRY_SCHEMA}, "
    f"int rows, int columns, str upsample, {POOLING_SCHEMA}, str activation, float slope) -> Tensor",
    reference=reference.ekdaa_conv_error,
    fake=_fake,
    triton_module="bpfree_kernels.triton.ekdaa",
)


@torch.no_grad()
def ekdaa_error(
    change: Tensor,
    z: Tensor,
    *,
    beta: float = 0.9,
    pool: MaxPool | None = None,
    upsample: str = "argmax",
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Error of some units whose target lies β d away: ``f(z) - f(z - beta * up(change))``.

    Args:
        change: d, what came down through an error kernel, shaped like `z`; with `pool`, the pooled maps
            [batch, channels, rows, columns].
        z: pre-activation of the units, [batch, ...], with `pool` maps [batch, channels, height, width];
            the batch may be empty.
        beta: how far the target is moved.
        pool: the max pooling that f(z) went through.
        upsample: how d passes the pooling, ``"argmax"``, ``"nearest"``, ``"average"`` or ``"bilinear"``.
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default; ``"bilinear"``
            has the reference alone.

    Returns:
        e, shaped like `z` and in its order in memory.

    Raises:
        TypeError: an unsupported dtype, dtypes that differ, or another `pool` than a `MaxPool`.
        ValueError: shapes or devices that do not fit, an unknown activation or up-sampling, or another
            backend than the reference for ``"bilinear"``.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z must have shape [batch, ...], got {tuple(z.shape)}.")
    backend = _check_spread(pool, upsample, backend)
    name, parameter = resolve_activation(activation, slope)
    if pool is None:
        checks.like("change", change, "z", z)
    else:
        checks.dims("z", z, 4, "[batch, channels, height, width]")
        wanted = (*z.shape[:2], *pool.size((z.shape[2], z.shape[3])))
        checks.shape("change", change, wanted, "of the pooled z")
        checks.same_kind("change", change, "z", z)
    body = backends.body("ekdaa_error", z.device.type, backend)
    shape = z.shape
    if len(shape) != 4:  # units in any order, each by itself: maps of one unit
        z, change = (t.reshape(shape[0], shape[1:].numel(), 1, 1) for t in (z, change))
    windows = (pool or _NO_POOLING).windows()
    e = body(as_maps(change), as_maps(z), float(beta), upsample, *windows, name, parameter)
    return cast(Tensor, e if len(shape) == 4 else e.view(shape))


@torch.no_grad()
def ekdaa_linear_error(
    error: Tensor,
    feedback: Tensor,
    z: Tensor,
    *,
    beta: float = 0.9,
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Error of the units below a dense layer, in one pass: ``f(z) - f(z - beta * error @ feedback)``.

    Args:
        error: e of the layer's own units, [batch, out]; the batch may be empty.
        feedback: E, [out, in], as the layer's weight lies.
        z: pre-activation of the units below, [batch, in].
        beta, activation, slope, backend: as in `ekdaa_error`.

    Returns:
        e of the units below, [batch, in].

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("z", z)
    checks.dims("z", z, 2, "[batch, in]")
    checks.dims("feedback", feedback, 2, "[out, in]")
    checks.shape("feedback", feedback, (feedback.shape[0], z.shape[1]), "[out, in]")
    checks.same_kind("feedback", feedback, "z", z)
    checks.shape("error", error, (z.shape[0], feedback.shape[0]), "[batch, out]")
    checks.same_kind("error", error, "z", z)
    name, parameter = resolve_activation(activation, slope)
    body = backends.body("ekdaa_linear_error", z.device.type, backend)
    read = (error.contiguous(), feedback.contiguous(), z.contiguous())
    return cast(Tensor, body(*read, float(beta), name, parameter))


@torch.no_grad()
def ekdaa_conv_error(
    error: Tensor,
    feedback: Tensor,
    z: Tensor,
    *,
    beta: float = 0.9,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    pool: MaxPool | None = None,
    upsample: str = "argmax",
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Error of the maps below a convolution, without maps in between.

    Equivalent to ``ekdaa_error(d, z, ...)`` of the maps ``d = F.conv_transpose2d(error, feedback, ...)``
    that have the size of the convolution's input.

    Args:
        error: e of the convolution's own maps, [batch, out, out_height, out_width]; the batch may be empty.
        feedback: E, [out, in/groups, kernel_h, kernel_w], as the convolution's weight lies.
        z: pre-activation of the maps below, [batch, in, height, width].
        beta: how far the target is moved.
        stride, padding, dilation, groups: of the convolution, as `torch.nn.Conv2d` has them.
        pool: the max pooling between f(z) and the convolution.
        upsample, activation, slope, backend: as in `ekdaa_error`.

    Returns:
        e of the maps below, shaped like `z` and in its order in memory.

    Raises:
        TypeError: an unsupported dtype, dtypes that differ, or another `pool` than a `MaxPool`.
        ValueError: shapes or devices that do not fit, an unknown activation or up-sampling, or another
            backend than the reference for ``"bilinear"``.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("z", z)
    checks.dims("z", z, 4, "[batch, in, height, width]")
    backend = _check_spread(pool, upsample, backend)
    name, parameter = resolve_activation(activation, slope)
    size = (z.shape[2], z.shape[3])
    entered = size if pool is None else pool.size(size)
    place, gives = check_conv(
        (z.shape[1], *entered), feedback, stride, padding, dilation, groups, name="feedback"
    )
    checks.same_kind("feedback", feedback, "z", z)
    checks.shape("error", error, (z.shape[0], *gives), "[batch, out, out_height, out_width]")
    checks.same_kind("error", error, "z", z)
    windows = (pool or _NO_POOLING).windows()
    body = backends.body("ekdaa_conv_error", z.device.type, backend)
    return cast(
        Tensor,
        body(
            as_maps(error), feedback.contiguous(), as_maps(z), float(beta), *place,
            *entered, upsample, *windows, name, parameter,
        ),
    )  # fmt: skip


def _check_spread(pool: MaxPool | None, upsample: str, backend: str | None) -> str | None:
    """Check a pooling, and how d passes it; returns the backend that has this up-sampling."""
    if not isinstance(pool, MaxPool | None):
        raise TypeError(f"pool must be a MaxPool or None, got {type(pool).__name__}.")
    if upsample not in UPSAMPLINGS:
        known = ", ".join(repr(name) for name in UPSAMPLINGS)
        raise ValueError(f"upsample must be one of {known}, got {upsample!r}.")
    if upsample != "bilinear":
        return backend
    if backend not in (None, "reference"):
        raise ValueError(f"backend must be 'reference' for upsample 'bilinear', got {backend!r}.")
    return "reference"
