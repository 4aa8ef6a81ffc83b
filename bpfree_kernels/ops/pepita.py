"""PEPITA: present the error to perturb the input to modulate activity (Dellaferrera and Kreiman, 2022).

After an ordinary forward pass the output's error e is projected onto the input by a fixed random matrix
F, and the network runs again on x + F e. A hidden layer learns from how its output changed (the paper's
equations 3 to 5, in the gradient convention)::

    ∂W_l = mean over the batch of (h_l − h′_l) · h′_{l−1}ᵀ,   h the first pass, h′ the second

The second pass differs little from the first, so subtracting the two loses most digits. Here the
difference itself runs through the network instead (the *difference form*)::

    Δz_l = W_l Δh_{l−1},   Δh_l = (f(z_l + Δz_l) − f(z_l)) ⊙ mask,   ∂W_l = −mean of Δh_l · preᵀ

with Δh_0 = F e and f(z + Δz) − f(z) formed without cancellation. In the first layer Δz = (W F) e: with
fewer classes than samples, a fraction of a second pass. pre is h′ = h + Δh, or h (the paper allows both).
A dropout mask is the first pass's own, and counts once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.ops._define import LAYER_UPDATE_SCHEMA, MapOrder, contiguous, define, wrote
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_dense
from bpfree_kernels.reference import pepita as reference
from bpfree_kernels.update import LayerState, UpdateRule


def _fake(z: Tensor, *_: object) -> Tensor:
    return torch.empty_like(z)


define(
    "pepita_linear_step",
    "(Tensor z, Tensor pre, Tensor change, Tensor? feedback, Tensor? mask, "
    "Tensor(w!) weight, Tensor(b!)? bias, str activation, float slope, "
    f"{LAYER_UPDATE_SCHEMA}) -> Tensor",
    reference=reference.pepita_linear_step,
    fake=_fake,
    triton_module="bpfree_kernels.triton.pepita",
)
define(
    "pepita_linear_grad",
    "(Tensor z, Tensor pre, Tensor change, Tensor? feedback, Tensor? mask, Tensor weight, "
    "str activation, float slope, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> Tensor",
    reference=reference.pepita_linear_grad,
    fake=_fake,
    triton_module="bpfree_kernels.triton.pepita",
)
define(
    "pepita_difference",
    "(Tensor z, Tensor change, Tensor? basis, str activation, float slope) -> Tensor",
    reference=reference.pepita_difference,
    fake=_fake,
    triton_module="bpfree_kernels.triton.pepita",
)
define(
    "pepita_difference_",
    "(Tensor(z!) z, Tensor change, Tensor? basis, str activation, float slope) -> ()",
    reference=reference.pepita_difference_,
    fake=lambda *_: None,
    triton_module="bpfree_kernels.triton.pepita",
)


@torch.no_grad()
def pepita_linear_step(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    feedback: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Second pass through a hidden layer, which learns from its change, in one pass over its weight.

    Equivalent to::

        dx = change if feedback is None else change @ feedback.T
        dz = F.linear(dx, weight)
        dh = (f(z + dz) - f(z)) * mask                  # without cancellation
        update(weight, -dh.T @ pre / batch); update(bias, -dh.mean(0))      # in place
        return dh                                                           # of the old weight

    Args:
        z: pre-activation of the first pass (`dense_forward`), [batch, out].
        pre: presynaptic factor, the layer's input of the second pass or of the first, [batch, in].
        change: how the layer's input changed, [batch, in]; with `feedback`, the output's error
            [batch, classes].
        weight: [out, in], updated in place.
        bias: [out], updated in place, or ``None``.
        update: the update rule, e.g. ``SGD(lr=0.1, momentum=0.9)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        feedback: F of the first layer, [in, classes]; fastest as the transpose of a contiguous
            [classes, in].
        mask: dropout mask of the first pass with its factor (0 or 1/keep), [batch, out].
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        Δh, the change of the layer's output, [batch, out].

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown activation, state
            that is missing, or tensors that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    _check_linear(z, pre, change, feedback, mask, weight, bias)
    name, parameter = resolve_activation(activation, slope)
    layer = LayerUpdate(weight, bias, update, state)
    layer.check_disjoint(z=z, pre=pre, change=change, feedback=feedback, mask=mask)
    body = backends.body("pepita_linear_step", pre.device.type, backend)
    return cast(Tensor, layer.run(body, _read(z, pre, change, feedback, mask), (name, parameter)))


@torch.no_grad()
def pepita_linear_grad(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    feedback: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    slope: float | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Second pass through a hidden layer, and the gradients that `pepita_linear_step` would apply.

    Args:
        z, pre, change, weight, bias, feedback, mask, activation, slope, backend: as in
            `pepita_linear_step`.
        grad_weight: written instead of a new tensor, [out, in].
        grad_bias: written instead of a new tensor, [out].
        accumulate: add to `grad_weight` and `grad_bias` instead of overwriting them.

    Returns:
        Δh, gradient of the weight, gradient of the bias (``None`` without a bias).

    Raises:
        TypeError, ValueError, RuntimeError: as `pepita_linear_step`; ValueError also for
            ``accumulate`` without gradients to add to.
    """
    _check_linear(z, pre, change, feedback, mask, weight, bias)
    name, parameter = resolve_activation(activation, slope)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(
        z=z, pre=pre, change=change, feedback=feedback, mask=mask, weight=weight, bias=bias
    )
    body = backends.body("pepita_linear_grad", pre.device.type, backend)
    args = (*_read(z, pre, change, feedback, mask), weight.contiguous(), name, parameter)
    return cast(Tensor, grads.run(body, args)), grads.weight, grads.bias


@torch.no_grad()
def pepita_difference(
    z: Tensor,
    change: Tensor,
    *,
    basis: Tensor | None = None,
    activation: str = "relu",
    slope: float | None = None,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How an activation changes, f(z + Δz) − f(z), without cancellation; for convolutional maps.

    A convolution is linear, so the first layer's Δz = conv(F e) is a mixture of C basis images,
    conv(F_c), weighted by each sample's error: Δz = Σ_c e_c · basis_c.

    Args:
        z: pre-activation of the first pass, [batch, ...]; the batch may be empty.
        change: Δz, shaped like `z`; with `basis`, the output's error [batch, classes].
        basis: basis images conv(F_c) without bias, [classes, ...].
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        in_place: write the result into `z`, which a second pass needs for the last time here; that
            saves fresh memory, which costs more than the arithmetic for large maps.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        The change of the output, shaped like `z` (channels last if z is); with `in_place`, `z` itself.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an unknown activation, or with `in_place`
            tensors that share memory.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z must have shape [batch, ...], got {tuple(z.shape)}.")
    if basis is None:
        checks.like("change", change, "z", z)
    else:
        checks.dims("change", change, 2, "[batch, classes]")
        checks.shape("change", change, (z.shape[0], change.shape[1]), "[batch, classes]")
        checks.same_kind("change", change, "z", z)
        wanted = (change.shape[1], *z.shape[1:])
        checks.shape("basis", basis, wanted, "[classes, ...] with the rest of z")
        checks.same_kind("basis", basis, "z", z)
    name, parameter = resolve_activation(activation, slope)
    order = MapOrder(z)
    if not in_place:
        body = backends.body("pepita_difference", z.device.type, backend)
        return order.leave(body(*order.enter(z, change, basis), name, parameter))
    checks.disjoint({"z": z}, {"change": change, "basis": basis})
    body = backends.body("pepita_difference_", z.device.type, backend)
    entered = order.enter(z, change, basis)
    body(*entered, name, parameter)
    # enter() gives a view, unless it had to copy
    result = order.leave(cast(Tensor, entered[0]))
    wrote([z], [z if result.data_ptr() == z.data_ptr() else result])
    return z


def _read(
    z: Tensor, pre: Tensor, change: Tensor, feedback: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a body reads, contiguous, with the feedback as rows [classes, in]."""
    rows = None if feedback is None else feedback.t()
    return tuple(contiguous((z, pre, change, rows, mask)))


def _check_linear(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    feedback: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    check_dense(pre, weight, bias, name="pre")
    checks.shape("z", z, (pre.shape[0], weight.shape[0]), "[batch, out]")
    checks.same_kind("z", z, "pre", pre)
    if feedback is None:
        checks.like("change", change, "pre", pre)
    else:
        checks.dims("feedback", feedback, 2, "[in, classes]")
        wanted = (pre.shape[1], feedback.shape[1])
        checks.shape("feedback", feedback, wanted, "[in, classes]")
        checks.same_kind("feedback", feedback, "pre", pre)
        checks.shape("change", change, (pre.shape[0], feedback.shape[1]), "[batch, classes]")
        checks.same_kind("change", change, "pre", pre)
    if mask is not None:
        checks.like("mask", mask, "z", z)
