"""DRTP: direct random target projection (Frenkel, Lefebvre and Bol, 2021).

A hidden layer y = f(W x + b) learns from the class label alone. Its signal is a fixed random row of the
feedback matrix B, gated by the slope of the activation (the paper's algorithm 1, in the gradient
convention of the authors' code)::

    post = B[label] ⊙ f′(W x + b),   ∂W = Σ_batch post · xᵀ,   ∂b = Σ_batch post

so a layer needs nothing from the layers above, and can learn before they have even run.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.ops._define import LAYER_UPDATE_SCHEMA, MapOrder, define
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_dense
from bpfree_kernels.reference import drtp as reference
from bpfree_kernels.update import LayerState, UpdateRule


def _fake_output(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_signal(z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z)


define(
    "drtp_linear_step",
    "(Tensor x, Tensor(w!) weight, Tensor(b!)? bias, Tensor feedback, Tensor labels, "
    f"str activation, float slope, {LAYER_UPDATE_SCHEMA}) -> Tensor",
    reference=reference.drtp_linear_step,
    fake=_fake_output,
    triton_module="bpfree_kernels.triton.drtp",
)
define(
    "drtp_linear_grad",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor feedback, Tensor labels, "
    "str activation, float slope, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> Tensor",
    reference=reference.drtp_linear_grad,
    fake=_fake_output,
    triton_module="bpfree_kernels.triton.drtp",
)
define(
    "drtp_signal",
    "(Tensor z, Tensor feedback, Tensor labels, str activation, float slope) -> (Tensor, Tensor)",
    reference=reference.drtp_signal,
    fake=_fake_signal,
    triton_module="bpfree_kernels.triton.drtp",
)


@torch.no_grad()
def drtp_linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run a hidden layer and let it learn, in one pass over its weight.

    Equivalent to::

        z = F.linear(x, weight, bias)
        post = feedback[labels] * f_prime(z)
        update(weight, post.T @ x); update(bias, post.sum(0))      # in place
        return f(z)                                                # of the old weight

    Args:
        x: input, [batch, in].
        weight: [out, in], updated in place.
        bias: [out], updated in place, or ``None``.
        feedback: fixed random matrix B, [classes, out].
        labels: class of each sample, int32 or int64, [batch].
        update: the update rule, e.g. ``SGD(lr=1e-3)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        The layer's output f(W x + b) with the weight before the update, [batch, out].

    Raises:
        IndexError: a label outside [0, classes), on the CPU (see `set_label_checks` for GPUs).
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown activation, state
            that is missing, or tensors that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    activation, slope = _check_linear(x, weight, bias, feedback, labels, activation, slope)
    layer = LayerUpdate(weight, bias, update, state)
    layer.check_disjoint(x=x, feedback=feedback, labels=labels)
    body = backends.body("drtp_linear_step", x.device.type, backend)
    after = (feedback.contiguous(), labels.contiguous(), activation, slope)
    return cast(Tensor, layer.run(body, (x.contiguous(),), after))


@torch.no_grad()
def drtp_linear_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    *,
    activation: str = "tanh",
    slope: float | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a hidden layer and return the gradients that `drtp_linear_step` would apply.

    Args:
        x, weight, bias, feedback, labels, activation, slope, backend: as in `drtp_linear_step`.
        grad_weight: where the weight's gradient goes, [out, in]; made if ``None``.
        grad_bias: where the bias's gradient goes, [out]; made if ``None`` and there is a bias.
        accumulate: add to the gradients given instead of overwriting them.

    Returns:
        The output [batch, out], the gradient of the weight, and that of the bias (``None`` without).

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `drtp_linear_step`; ValueError also for
            ``accumulate`` without gradients to add to.
    """
    activation, slope = _check_linear(x, weight, bias, feedback, labels, activation, slope)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(x=x, weight=weight, bias=bias, feedback=feedback, labels=labels)
    body = backends.body("drtp_linear_grad", x.device.type, backend)
    tensors = (t if t is None else t.contiguous() for t in (x, weight, bias, feedback, labels))
    output = grads.run(body, (*tensors, activation, slope))
    return output, grads.weight, grads.bias


@torch.no_grad()
def drtp_signal(
    z: Tensor,
    feedback: Tensor,
    labels: Tensor,
    *,
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Activation and learning signal of a map, in one pass over its pre-activation.

    Equivalent to ``f(z), feedback[labels] * f_prime(z)``. For a convolution, z is its output before
    pooling, and the weight gradient is torch's own convolution weight gradient of the signal.

    Args:
        z: pre-activation, [batch, ...].
        feedback: fixed random B, [classes, ...] with the same trailing dimensions as z.
        labels: class of each sample, int32 or int64, [batch].
        activation, slope, backend: as in `drtp_linear_step`.

    Returns:
        The output f(z) and the signal B[label] ⊙ f′(z), both shaped like z (channels last if z is).

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `drtp_linear_step`.
    """
    activation, slope = resolve_activation(activation, slope)
    checks.floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z must have shape [batch, ...], got {tuple(z.shape)}.")
    _check_feedback(feedback, tuple(z.shape[1:]), "[classes, *z.shape[1:]]", "z", z)
    checks.labels(labels, z.shape[0], feedback.shape[0], z.device)
    body = backends.body("drtp_signal", z.device.type, backend)
    order = MapOrder(z)
    y, signal = body(*order.enter(z, feedback, labels), activation, slope)
    return order.leave(y), order.leave(signal)


def _check_feedback(
    feedback: Tensor, trailing: tuple[int, ...], meaning: str, other_name: str, other: Tensor
) -> None:
    checks.tensor("feedback", feedback)
    classes = feedback.shape[0] if feedback.dim() else 0
    if classes == 0:
        raise ValueError(f"feedback must have shape {meaning}, got {tuple(feedback.shape)}.")
    checks.shape("feedback", feedback, (classes, *trailing), meaning)
    checks.same_kind("feedback", feedback, other_name, other)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float | None,
) -> tuple[str, float]:
    resolved = resolve_activation(activation, slope)
    check_dense(x, weight, bias)
    _check_feedback(feedback, (weight.shape[0],), "[classes, out]", "x", x)
    checks.labels(labels, x.shape[0], feedback.shape[0], x.device)
    return resolved
