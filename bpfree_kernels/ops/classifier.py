"""The output layer, which every rule trains with the true gradient of its loss.

========= ========== ========================================= ================ ===============
loss      output y   loss of one sample                        error e          gradient at z
========= ========== ========================================= ================ ===============
``ce``    softmax(z) −log y[label]                             y − t            e / N
``bce``   sigmoid(z) mean over classes of binary cross-entropy y − t            e / (N·C)
``mse``   z          mean over classes of (y − t)²             y − t            2 e / (N·C)
``hinge`` z          max(m − z_c, 0) + μ Σ max(m + z_i, 0)     −[z_c ≤ m],      e / N
                     over the classes i ≠ c = label            μ [z_i ≥ −m]
========= ========== ========================================= ================ ===============

z = W x + b, t the one-hot label, N the batch, C the classes; the batch loss is the mean over samples.
The error e is returned as well: the other rules project it down. The multi-class hinge loss has a
margin m and a weight μ of the other classes; a logit that lies exactly on a threshold keeps its
gradient. A label that is no class (where nobody checks it) is a t of zeros, and for ``hinge`` all
classes are others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.losses import check_loss, resolve_loss
from bpfree_kernels.ops._define import LAYER_UPDATE_SCHEMA, contiguous, define
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_dense
from bpfree_kernels.reference import classifier as reference
from bpfree_kernels.update import LayerState, UpdateRule


class ClassifierOutput(NamedTuple):
    """What a classifier step returns.

    Attributes:
        output: probabilities (``ce``, ``bce``) or logits (``mse``, ``hinge``), [batch, classes].
        error: what the gradient at the logits is a multiple of (see the module), [batch, classes].
        loss: loss of each sample, [batch]; its mean is torch's loss of the batch.
    """

    output: Tensor
    error: Tensor
    loss: Tensor


def _fake(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    output = x.new_empty(x.shape[0], weight.shape[0])
    return output, torch.empty_like(output), x.new_empty(x.shape[0])


_LOSS_SCHEMA = "str loss, float margin, float off_class"

define(
    "classifier_forward",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor labels, {_LOSS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.classifier_forward,
    fake=_fake,
    triton_module="bpfree_kernels.triton.classifier",
)
define(
    "classifier_step",
    f"(Tensor x, Tensor(w!) weight, Tensor(b!)? bias, Tensor labels, {_LOSS_SCHEMA}, "
    f"{LAYER_UPDATE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=reference.classifier_step,
    fake=_fake,
    triton_module="bpfree_kernels.triton.classifier",
)
define(
    "classifier_grad",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor labels, {_LOSS_SCHEMA}, "
    "Tensor(g!) grad_weight, Tensor(h!)? grad_bias, bool accumulate) -> (Tensor, Tensor, Tensor)",
    reference=reference.classifier_grad,
    fake=_fake,
    triton_module="bpfree_kernels.triton.classifier",
)


@torch.no_grad()
def classifier_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    loss: str = "ce",
    margin: float | None = None,
    off_class: float | None = None,
    backend: str | None = None,
) -> ClassifierOutput:
    """Run an output layer and compare it with its labels; nothing learns.

    Args:
        x, weight, bias, labels, loss, margin, off_class, backend: as in `classifier_step`; the
            batch may be empty.

    Returns:
        Output, error and loss.

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `classifier_step`.
    """
    options = _check(x, weight, bias, labels, (loss, margin, off_class), learns=False)
    body = backends.body("classifier_forward", x.device.type, backend)
    return ClassifierOutput(*body(*contiguous((x, weight, bias, labels)), *options))


@torch.no_grad()
def classifier_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    update: UpdateRule,
    state: LayerState | None = None,
    *,
    loss: str = "ce",
    margin: float | None = None,
    off_class: float | None = None,
    backend: str | None = None,
) -> ClassifierOutput:
    """Run an output layer and let it learn from its labels.

    Args:
        x: input, [batch, in].
        weight: [classes, in], updated in place.
        bias: [classes], updated in place, or ``None``.
        labels: class of each sample, int32 or int64, [batch].
        update: the update rule, e.g. ``Adam(lr=1e-3)``.
        state: what the rule remembers (``update.new_state(weight, bias)``), updated in place.
        loss: ``"ce"``, ``"bce"``, ``"mse"`` or ``"hinge"`` (see the module).
        margin: m of ``"hinge"``, 1 if not given.
        off_class: μ of ``"hinge"``, 1 / (classes − 1) if not given, or 0 for a single class.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        Output, error and loss, all of the weight before the update.

    Raises:
        IndexError: a label outside [0, classes), on the CPU (see `set_label_checks` for GPUs).
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown loss, options
            that are out of range or not the loss's, state that is missing, or tensors that share
            memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    options = _check(x, weight, bias, labels, (loss, margin, off_class))
    layer = LayerUpdate(weight, bias, update, state)
    layer.check_disjoint(x=x, labels=labels)
    body = backends.body("classifier_step", x.device.type, backend)
    result = layer.run(body, (x.contiguous(),), (labels.contiguous(), *options))
    return ClassifierOutput(*result)


@torch.no_grad()
def classifier_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    loss: str = "ce",
    margin: float | None = None,
    off_class: float | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[ClassifierOutput, Tensor, Tensor | None]:
    """Run an output layer and return the gradients that `classifier_step` would apply.

    Args:
        x, weight, bias, labels, loss, margin, off_class, backend: as in `classifier_step`.
        grad_weight: where the weight's gradient goes, [classes, in]; made if ``None``.
        grad_bias: where the bias's gradient goes, [classes]; made if ``None`` and there is a bias.
        accumulate: add to the gradients given instead of overwriting them.

    Returns:
        Output, error and loss; the gradient of the weight; that of the bias (``None`` without).

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `classifier_step`; ValueError also for
            ``accumulate`` without gradients to add to.
    """
    options = _check(x, weight, bias, labels, (loss, margin, off_class))
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(x=x, weight=weight, bias=bias, labels=labels)
    body = backends.body("classifier_grad", x.device.type, backend)
    tensors = (t if t is None else t.contiguous() for t in (x, weight, bias, labels))
    result = grads.run(body, (*tensors, *options))
    return ClassifierOutput(*result), grads.weight, grads.bias


def gradient_scale(loss: str, batch: int, classes: int) -> float:
    """Factor between the error e and the gradient of the batch's loss at z (the table above).

    With it, `dense_step` trains an output layer from an error that came from elsewhere.

    Args:
        loss: ``"ce"``, ``"bce"``, ``"mse"`` or ``"hinge"``.
        batch: number of samples N.
        classes: number of classes C.

    Raises:
        ValueError: an unknown loss, or a batch or a number of classes below 1.
    """
    check_loss(loss)
    if batch < 1 or classes < 1:
        raise ValueError(f"batch and classes must be at least 1, got {batch} and {classes}.")
    return reference.gradient_scale(loss, batch, classes)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: tuple[str, float | None, float | None],
    *,
    learns: bool = True,
) -> tuple[str, float, float]:
    """Check everything; returns loss, margin and μ for the body, from those given."""
    check_loss(options[0])
    check_dense(x, weight, bias, learns=learns)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must hold at least one class, got {tuple(weight.shape)}.")
    checks.labels(labels, x.shape[0], weight.shape[0], x.device)
    return resolve_loss(*options, weight.shape[0])
