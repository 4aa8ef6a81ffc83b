"""What a convolution learns from a signal at its output units (post) and its input (pre).

::

    ∂W = scale · Σ_batch Σ_positions δ[p] · window(x, p)ᵀ,   ∂b = scale · Σ_batch Σ_positions δ[p]

Forward, a convolution is torch's own. A feedback weight that lies like W may learn from the same product,
by a factor of its own: R of URFB (factor 1), the error kernel E of EKDAA (γ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.geometry import GEOMETRY_SCHEMA, Geometry, geometry, output_size
from bpfree_kernels.maps import as_maps
from bpfree_kernels.ops._define import FEEDBACK_STATE_SCHEMA, LAYER_UPDATE_SCHEMA, define
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_feedback
from bpfree_kernels.reference import conv as reference
from bpfree_kernels.update import LayerState, ParamState, UpdateRule

Ints = int | Sequence[int]


def _fake(*_: object) -> None:
    return None


define(
    "conv_step",
    "(Tensor signal, Tensor x, Tensor(w!) weight, Tensor(b!)? bias, Tensor(r!)? feedback, "
    f"float scale, float feedback_scale, {GEOMETRY_SCHEMA}, "
    f"{LAYER_UPDATE_SCHEMA}, {FEEDBACK_STATE_SCHEMA}) -> ()",
    reference=reference.conv_step,
    fake=_fake,
    triton_module="bpfree_kernels.triton.conv",
)
define(
    "conv_grad",
    f"(Tensor signal, Tensor x, float scale, {GEOMETRY_SCHEMA}, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> ()",
    reference=reference.conv_grad,
    fake=_fake,
    triton_module="bpfree_kernels.triton.conv",
)


@torch.no_grad()
def conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    feedback: Tensor | None = None,
    feedback_state: ParamState | None = None,
    feedback_scale: float = 1.0,
    scale: float = 1.0,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    backend: str | None = None,
) -> None:
    """Let a convolution learn from a signal at its output units; its feedback weight, too.

    Equivalent to ``g = conv_grad(...)``, then in place ``update(weight, g)``, ``update(bias, …)`` and
    ``update(feedback, feedback_scale * g)``.

    Args:
        signal: δ at the output units, a gradient by convention, [batch, out, out_height, out_width].
        x: input of the layer, [batch, in, height, width].
        weight: [out, in/groups, kernel_h, kernel_w], updated in place.
        bias: [out], updated in place, or ``None``.
        update: the update rule, e.g. ``SGD(lr=0.1)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        feedback: weight that learns beside `weight`, shaped like it. ``None``: nothing does.
        feedback_state: what the rule remembers of it (``update.new_param_state(feedback)``).
        feedback_scale: factor of its gradient (γ of EKDAA), on top of `scale`.
        scale: factor of the gradients, e.g. 1 / batch for a mean.
        stride, dilation, groups: as `torch.nn.Conv2d` has them.
        padding: zeros around the map: an int, a pair (height, width), ``"same"`` or ``"valid"``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, state that is missing, or tensors
            that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    place = _check_learning(signal, x, weight, bias, stride, padding, dilation, groups)
    checks.not_empty("x", x)
    check_feedback(feedback, weight, feedback_state=feedback_state)
    layer = LayerUpdate(weight, bias, update, state, feedback=(feedback, feedback_state))
    layer.check_disjoint(signal=signal, x=x)
    body = backends.body("conv_step", x.device.type, backend)
    layer.run(body, (as_maps(signal), as_maps(x)), (float(scale), float(feedback_scale), *place))


@torch.no_grad()
def conv_grad(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
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
    """Return the gradients that `conv_step` would apply.

    Args:
        signal, x, weight, bias, scale: as in `conv_step`; weight and bias only say which gradients are
            wanted. The batch may be empty.
        grad_weight: written instead of a new tensor, shaped like `weight`.
        grad_bias: written instead of a new tensor, [out].
        accumulate: add to `grad_weight` and `grad_bias` instead of overwriting them.
        stride, padding, dilation, groups, backend: as in `conv_step`.

    Returns:
        Gradient of the weight and of the bias (``None`` without a bias).

    Raises:
        TypeError, ValueError, RuntimeError: as `conv_step`; ValueError also for ``accumulate`` without
            gradients to add to.
    """
    place = _check_learning(signal, x, weight, bias, stride, padding, dilation, groups)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(signal=signal, x=x, weight=weight, bias=bias)
    body = backends.body("conv_grad", x.device.type, backend)
    grads.run(body, (as_maps(signal), as_maps(x), float(scale), *place))
    return grads.weight, grads.bias


def check_conv(
    entering: tuple[int, int, int],
    weight: Tensor,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    *,
    name: str = "weight",
) -> tuple[Geometry, tuple[int, int, int]]:
    """Check that a convolution can take a map; returns where its windows lie, and what it gives.

    Args:
        entering: channels, height and width of the map.
        weight: [out, in/groups, kernel_h, kernel_w], called `name` in messages.
        stride, padding, dilation, groups: as `torch.nn.Conv2d` has them.

    Returns:
        The geometry, and (channels, height, width) of the output.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    checks.dims(name, weight, 4, "[out, in/groups, kernel_h, kernel_w]")
    out, per_group, kernel_h, kernel_w = weight.shape
    channels, *size = entering
    place = geometry((kernel_h, kernel_w), stride, padding, dilation, groups)
    if channels != per_group * groups:
        raise ValueError(
            f"{name} {tuple(weight.shape)} with {groups} groups takes {per_group * groups} channels, "
            f"but its input has {channels}."
        )
    if out % groups != 0:
        raise ValueError(f"{name} must have a multiple of {groups} (groups) outputs, got {out}.")
    return place, (out, *output_size(size, (kernel_h, kernel_w), stride, padding, dilation))


def _check_learning(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
) -> Geometry:
    checks.floating("x", x)
    checks.dims("x", x, 4, "[batch, in, height, width]")
    entering = (x.shape[1], x.shape[2], x.shape[3])
    place, gives = check_conv(entering, weight, stride, padding, dilation, groups)
    checks.same_kind("weight", weight, "x", x)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "[out]")
        checks.same_kind("bias", bias, "x", x)
    checks.shape("signal", signal, (x.shape[0], *gives), "[batch, out, out_height, out_width]")
    checks.same_kind("signal", signal, "x", x)
    return place
