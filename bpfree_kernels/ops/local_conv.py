"""Locally connected layers: convolutions whose weights differ from place to place (*untied*).

With window(x, p) the values of x under the window of output position p, each position has its own W[p]
and b[p]::

    z[p] = W[p]ᵀ window(x, p) + b[p],   y = f(z)
    ∂W[p] = scale · Σ_batch window(x, p) · δ[p]ᵀ,   ∂b[p] = scale · Σ_batch δ[p]
    feedback: Σ over the windows that hold an input of W[p] δ[p], or of R[p] δ[p], times f′ of the field below

The weight is [rows, columns, kernel_h, kernel_w, in/groups, out] (Keras' LocallyConnected2D has the first
two and the next three dimensions flattened), the bias [rows, columns, out]. What lies outside the map
counts as zero. Maps are [batch, channels, height, width] with the channels first or last in memory; results
lie as the maps that they were made from. No window is ever copied.

`local_conv_step` lets W and a feedback R learn from one product, as URFB does (`bpfree.URFB`), each where
its connectivity mask is True. Elsewhere neither the weight nor its state changes, whatever its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.geometry import GEOMETRY_SCHEMA, Geometry, geometry, output_size, pair
from bpfree_kernels.maps import as_maps, map_order
from bpfree_kernels.ops._define import (
    FEEDBACK_STATE_SCHEMA,
    LAYER_UPDATE_SCHEMA,
    contiguous,
    define,
)
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_feedback
from bpfree_kernels.reference import local_conv as reference
from bpfree_kernels.update import LayerState, ParamState, UpdateRule

Ints = int | Sequence[int]

WEIGHT_SHAPE = "[rows, columns, kernel_h, kernel_w, in/groups, out]"


class LocalConvOutput(NamedTuple):
    """What a locally connected layer computes.

    Attributes:
        z: pre-activation (field), [batch, out, rows, columns].
        output: f(z), shaped like `z`; `z` itself if the activation is the identity.
    """

    z: Tensor
    output: Tensor


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *_: object
) -> tuple[Tensor, Tensor]:
    rows, columns, out = weight.shape[0], weight.shape[1], weight.shape[5]
    z = x.new_empty(x.shape[0], out, rows, columns).to(memory_format=map_order(x))
    return z, z.new_empty(0) if activation == "identity" else torch.empty_like(z)


def _fake_feedback(
    signal: Tensor, weight: Tensor, gate: Tensor | None, activation: str, slope: float,
    height: int, width: int, *place: int,
) -> Tensor:  # fmt: skip
    channels = weight.shape[4] * Geometry(*place).groups
    maps = signal.new_empty(signal.shape[0], channels, height, width)
    return maps.to(memory_format=map_order(signal))


def _fake_learning(*_: object) -> None:
    return None


define(
    "local_conv_forward",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, float slope, "
    f"{GEOMETRY_SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.local_conv_forward,
    fake=_fake_forward,
    triton_module="bpfree_kernels.triton.local_conv",
)
define(
    "local_conv_feedback",
    "(Tensor signal, Tensor weight, Tensor? gate, str activation, float slope, "
    f"int height, int width, {GEOMETRY_SCHEMA}) -> Tensor",
    reference=reference.local_conv_feedback,
    fake=_fake_feedback,
    triton_module="bpfree_kernels.triton.local_conv",
)
define(
    "local_conv_grad",
    f"(Tensor signal, Tensor x, Tensor? mask, float scale, {GEOMETRY_SCHEMA}, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> ()",
    reference=reference.local_conv_grad,
    fake=_fake_learning,
    triton_module="bpfree_kernels.triton.local_conv",
)
define(
    "local_conv_step",
    "(Tensor signal, Tensor x, Tensor(w!) weight, Tensor(b!)? bias, Tensor(r!)? feedback, "
    f"Tensor? weight_mask, Tensor? feedback_mask, float scale, {GEOMETRY_SCHEMA}, "
    f"{LAYER_UPDATE_SCHEMA}, {FEEDBACK_STATE_SCHEMA}) -> ()",
    reference=reference.local_conv_step,
    fake=_fake_learning,
    triton_module="bpfree_kernels.triton.local_conv",
)


@torch.no_grad()
def local_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    activation: str = "identity",
    slope: float | None = None,
    backend: str | None = None,
) -> LocalConvOutput:
    """Run a locally connected layer and keep its pre-activation; nothing is differentiated.

    Where all positions have the same weight, z is ``F.conv2d(x, weight[0, 0].permute(3, 2, 0, 1))``.
    For autograd use `local_conv`.

    Args:
        x: maps, [batch, in, height, width]; the batch may be empty.
        weight: [rows, columns, kernel_h, kernel_w, in/groups, out].
        bias: [rows, columns, out], or ``None``.
        stride, dilation, groups: as `torch.nn.Conv2d` has them.
        padding: zeros around the map: an int, a pair (height, width), ``"same"`` or ``"valid"``.
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        z and f(z), [batch, out, rows, columns].

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an input size that does not give the weight's
            rows and columns, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    place = check_layer(x, weight, bias, stride, padding, dilation, groups)
    name, parameter = resolve_activation(activation, slope)
    body = backends.body("local_conv_forward", x.device.type, backend)
    z, output = body(as_maps(x), *contiguous((weight, bias)), name, parameter, *place)
    return LocalConvOutput(z, z if name == "identity" else output)


@torch.no_grad()
def local_conv_feedback(
    signal: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    *,
    gate: Tensor | None = None,
    activation: str = "identity",
    slope: float | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Carry a signal down through a locally connected layer: its input gradient, or URFB's feedback.

    Args:
        signal: δ at the layer's output units, [batch, out, rows, columns]; the batch may be empty.
        weight: W, or the feedback R in its place, [rows, columns, kernel_h, kernel_w, in/groups, out].
        input_size: height and width of the layer's input.
        gate: field (pre-activation) of the layer below, [batch, in, height, width]; the result is
            multiplied by its f′. Without it nothing is.
        activation: f of the layer below (see `bpfree_kernels.activations`).
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        stride, padding, dilation, groups, backend: as in `local_conv_forward`.

    Returns:
        The signal at the layer's input, [batch, in, height, width].

    Raises:
        TypeError, ValueError, RuntimeError: as `local_conv_forward`.
    """
    checks.floating("signal", signal)
    checks.dims("weight", weight, 6, WEIGHT_SHAPE)
    checks.same_kind("weight", weight, "signal", signal)
    size = pair("input_size", input_size, 0)
    place = _check_size(size, weight, stride, padding, dilation, groups)
    _check_signal(signal, signal.shape[:1], weight)
    if gate is not None:
        wanted = (signal.shape[0], weight.shape[4] * groups, *size)
        checks.shape("gate", gate, wanted, "[batch, in, height, width]")
        checks.same_kind("gate", gate, "signal", signal)
    name, parameter = resolve_activation(activation, slope)
    body = backends.body("local_conv_feedback", signal.device.type, backend)
    signal = as_maps(signal)
    if gate is not None:
        gate = gate.contiguous(memory_format=map_order(signal))
    args = (signal, weight.contiguous(), gate, name, parameter, *size, *place)
    return cast(Tensor, body(*args))


@torch.no_grad()
def local_conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    feedback: Tensor | None = None,
    feedback_state: ParamState | None = None,
    weight_mask: Tensor | None = None,
    feedback_mask: Tensor | None = None,
    scale: float = 1.0,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    backend: str | None = None,
) -> None:
    """Let a locally connected layer learn from a signal at its output units; its feedback R, too.

    Equivalent to ``g = local_conv_grad(...)``, then in place ``update(weight, g)`` where `weight_mask`
    is True, ``update(bias, …)``, and ``update(feedback, g)`` where `feedback_mask` is True.

    Args:
        signal: δ at the layer's output units, a gradient by convention, [batch, out, rows, columns].
        x: input of the layer, [batch, in, height, width].
        weight: [rows, columns, kernel_h, kernel_w, in/groups, out], updated in place.
        bias: [rows, columns, out], updated in place, or ``None``.
        update: the update rule, e.g. ``SGD(lr=0.1)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        feedback: R, shaped like `weight`: it receives the same gradient. ``None``: nothing does.
        feedback_state: what the rule remembers of R (``update.new_param_state(feedback)``).
        weight_mask: bool, shaped like `weight`: False where a weight does not exist and never changes.
        feedback_mask: the same of R.
        scale: factor of the gradients, e.g. 1 / batch for a mean.
        stride, padding, dilation, groups, backend: as in `local_conv_forward`.

    Raises:
        TypeError, ValueError, RuntimeError: as `local_conv_forward`; TypeError also for a mask that is
            not boolean; ValueError also for an empty batch, state that is missing, a feedback mask
            without feedback, or tensors that share memory with one that is updated.
    """
    place = check_layer(x, weight, bias, stride, padding, dilation, groups)
    checks.not_empty("x", x)
    _check_signal(signal, x.shape[:1], weight)
    checks.same_kind("signal", signal, "x", x)
    check_mask("weight_mask", weight_mask, weight)
    check_feedback(feedback, weight, feedback_state=feedback_state, feedback_mask=feedback_mask)
    check_mask("feedback_mask", feedback_mask, weight)
    layer = LayerUpdate(weight, bias, update, state, feedback=(feedback, feedback_state))
    layer.check_disjoint(signal=signal, x=x, weight_mask=weight_mask, feedback_mask=feedback_mask)
    body = backends.body("local_conv_step", x.device.type, backend)
    masks = contiguous((weight_mask, feedback_mask))
    layer.run(body, (as_maps(signal), as_maps(x)), (*masks, float(scale), *place))


@torch.no_grad()
def local_conv_grad(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients that `local_conv_step` would apply.

    Args:
        signal, x, weight, bias, scale: as in `local_conv_step`; weight and bias only say which gradients
            are wanted. The batch may be empty.
        mask: bool, shaped like `weight`; the gradient is 0 where it is False.
        grad_weight: written instead of a new tensor, shaped like `weight`.
        grad_bias: written instead of a new tensor, shaped like `bias`.
        accumulate: add to `grad_weight` and `grad_bias` instead of overwriting them.
        stride, padding, dilation, groups, backend: as in `local_conv_forward`.

    Returns:
        Gradient of the weight and of the bias (``None`` without a bias).

    Raises:
        TypeError, ValueError, RuntimeError: as `local_conv_step`; ValueError also for ``accumulate``
            without gradients to add to.
    """
    place = check_layer(x, weight, bias, stride, padding, dilation, groups)
    _check_signal(signal, x.shape[:1], weight)
    checks.same_kind("signal", signal, "x", x)
    check_mask("mask", mask, weight)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(signal=signal, x=x, weight=weight, bias=bias, mask=mask)
    body = backends.body("local_conv_grad", x.device.type, backend)
    masks = contiguous((mask,))
    grads.run(body, (as_maps(signal), as_maps(x), *masks, float(scale), *place))
    return grads.weight, grads.bias


def check_mask(name: str, mask: Tensor | None, weight: Tensor) -> None:
    """Raise unless a mask, if there is one, is boolean (TypeError) and lies like a weight (ValueError)."""
    if mask is None:
        return
    checks.tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {mask.dtype}.")
    checks.shape(name, mask, tuple(weight.shape), "of weight")
    if mask.device != weight.device:
        raise ValueError(
            f"{name} must be on the device of weight, {weight.device}, got {mask.device}."
        )


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
) -> Geometry:
    """Check the input and the parameters of a layer; returns where its windows lie.

    Raises:
        TypeError, ValueError: as `local_conv_forward`.
    """
    checks.floating("x", x)
    checks.dims("x", x, 4, "[batch, in, height, width]")
    checks.dims("weight", weight, 6, WEIGHT_SHAPE)
    place = _check_size(tuple(x.shape[2:]), weight, stride, padding, dilation, groups)
    if x.shape[1] != weight.shape[4] * groups:
        raise ValueError(
            f"x must have {weight.shape[4] * groups} channels, as weight {tuple(weight.shape)} with "
            f"{groups} groups takes, got {x.shape[1]}."
        )
    checks.same_kind("weight", weight, "x", x)
    if bias is not None:
        wanted = (weight.shape[0], weight.shape[1], weight.shape[5])
        checks.shape("bias", bias, wanted, "[rows, columns, out]")
        checks.same_kind("bias", bias, "x", x)
    return place


def _check_size(
    size: tuple[int, ...],
    weight: Tensor,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
) -> Geometry:
    """Check that a map of this size gives the weight's rows and columns, and make the geometry."""
    rows, columns, kernel_h, kernel_w, _, out = weight.shape
    place = geometry((kernel_h, kernel_w), stride, padding, dilation, groups)
    if out % groups != 0:
        raise ValueError(f"weight must have a multiple of {groups} (groups) outputs, got {out}.")
    gives = output_size(size, (kernel_h, kernel_w), stride, padding, dilation)
    if gives != (rows, columns):
        raise ValueError(
            f"weight has {rows} x {columns} positions, but an input of {size[0]} x {size[1]} gives "
            f"{gives[0]} x {gives[1]}."
        )
    return place


def _check_signal(signal: Tensor, batch: Sequence[int], weight: Tensor) -> None:
    wanted = (*batch, weight.shape[5], weight.shape[0], weight.shape[1])
    checks.shape("signal", signal, wanted, "[batch, out, rows, columns]")
