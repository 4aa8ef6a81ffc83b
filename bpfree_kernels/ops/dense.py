"""A dense layer in two halves, for rules whose signal comes from elsewhere: forward, and learning.

Forward is z = W x + b, y = f(z), and keeps z. Learning takes the signal of each output unit (post) and
the input of the layer (pre), both for the whole batch::

    ∂W = scale · Σ_batch post · preᵀ,   ∂b = scale · Σ_batch post
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.ops._define import (
    FEEDBACK_STATE_SCHEMA,
    LAYER_UPDATE_SCHEMA,
    contiguous,
    define,
)
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_dense, check_feedback
from bpfree_kernels.reference import dense as reference
from bpfree_kernels.update import LayerState, ParamState, UpdateRule


class DenseOutput(NamedTuple):
    """What a dense layer computes.

    Attributes:
        z: pre-activation W x + b, [batch, out].
        output: f(z), [batch, out].
    """

    z: Tensor
    output: Tensor


def _fake_forward(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    z = x.new_empty(x.shape[0], weight.shape[0])
    return z, torch.empty_like(z)


def _fake_learning(*_: object) -> None:
    return None


define(
    "dense_forward",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, float slope) -> (Tensor, Tensor)",
    reference=reference.dense_forward,
    fake=_fake_forward,
    triton_module="bpfree_kernels.triton.dense",
)
define(
    "dense_step",
    "(Tensor post, Tensor pre, Tensor(w!) weight, Tensor(b!)? bias, Tensor(r!)? feedback, "
    f"float scale, float feedback_scale, {LAYER_UPDATE_SCHEMA}, {FEEDBACK_STATE_SCHEMA}) -> ()",
    reference=reference.dense_step,
    fake=_fake_learning,
    triton_module="bpfree_kernels.triton.dense",
)
define(
    "dense_grad",
    "(Tensor post, Tensor pre, float scale, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> ()",
    reference=reference.dense_grad,
    fake=_fake_learning,
    triton_module="bpfree_kernels.triton.dense",
)


@torch.no_grad()
def dense_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "tanh",
    slope: float | None = None,
    backend: str | None = None,
) -> DenseOutput:
    """Run a dense layer and keep its pre-activation: ``z = F.linear(x, weight, bias)``, ``f(z)``.

    Args:
        x: input, [batch, in]; the batch may be empty.
        weight: [out, in].
        bias: [out], or ``None``.
        activation: see `bpfree_kernels.activations`.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        z and f(z), two tensors of their own.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    check_dense(x, weight, bias, learns=False)
    name, parameter = resolve_activation(activation, slope)
    body = backends.body("dense_forward", x.device.type, backend)
    return DenseOutput(*body(*contiguous((x, weight, bias)), name, parameter))


@torch.no_grad()
def dense_step(
    post: Tensor,
    pre: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    feedback: Tensor | None = None,
    feedback_state: ParamState | None = None,
    feedback_scale: float = 1.0,
    scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Let a dense layer learn from a signal at its output units, in one pass over its weight.

    Equivalent to ``g = scale * post.T @ pre``, then in place ``update(weight, g)``, ``update(bias, scale *
    post.sum(0))`` and ``update(feedback, feedback_scale * g)``.

    Args:
        post: signal of each output unit, a gradient by convention, [batch, out].
        pre: input of the layer, [batch, in].
        weight: [out, in], updated in place.
        bias: [out], updated in place, or ``None``.
        update: the update rule, e.g. ``SGD(lr=1e-3)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        feedback: weight that learns beside `weight`, shaped like it: R of URFB, E of EKDAA. ``None``:
            nothing does.
        feedback_state: what the rule remembers of it (``update.new_param_state(feedback)``).
        feedback_scale: factor of its gradient (γ of EKDAA), on top of `scale`.
        scale: factor of the gradients, e.g. 1 / batch for a mean.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, state that is missing, or
            tensors that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    _check_learning(post, pre, weight, bias)
    check_feedback(feedback, weight, feedback_state=feedback_state)
    layer = LayerUpdate(weight, bias, update, state, feedback=(feedback, feedback_state))
    layer.check_disjoint(post=post, pre=pre)
    body = backends.body("dense_step", pre.device.type, backend)
    read = (post.contiguous(), pre.contiguous())
    layer.run(body, read, (float(scale), float(feedback_scale)))


@torch.no_grad()
def dense_grad(
    post: Tensor,
    pre: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float = 1.0,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients that `dense_step` would apply.

    Args:
        post, pre, weight, bias, scale, backend: as in `dense_step`; weight and bias only say which
            gradients are wanted.
        grad_weight: written instead of a new tensor, [out, in].
        grad_bias: written instead of a new tensor, [out].
        accumulate: add to `grad_weight` and `grad_bias` instead of overwriting them.

    Returns:
        Gradient of the weight and of the bias (``None`` without a bias).

    Raises:
        TypeError, ValueError, RuntimeError: as `dense_step`; ValueError also for ``accumulate``
            without gradients to add to.
    """
    _check_learning(post, pre, weight, bias)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(post=post, pre=pre, weight=weight, bias=bias)
    body = backends.body("dense_grad", pre.device.type, backend)
    grads.run(body, (post.contiguous(), pre.contiguous(), float(scale)))
    return grads.weight, grads.bias


def _check_learning(post: Tensor, pre: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dense(pre, weight, bias, name="pre")
    checks.shape("post", post, (pre.shape[0], weight.shape[0]), "[batch, out]")
    checks.same_kind("post", post, "pre", pre)
