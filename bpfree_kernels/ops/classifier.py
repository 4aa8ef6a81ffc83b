"""The output layer, which every rule trains with the true gradient of its loss.

======== ============ ============================================== =====================
loss     output       loss of one sample                             gradient at z
======== ============ ============================================== =====================
``ce``   softmax(z)   −log y[label]                                  (y − t) / N
``bce``  sigmoid(z)   mean over classes of binary cross-entropy      (y − t) / (N·C)
``mse``  z            mean over classes of (y − t)²                  2 (y − t) / (N·C)
======== ============ ============================================== =====================

z = W x + b, t the one-hot label, N the batch, C the classes; the batch loss is the mean over samples.
The error e = y − t is returned as well: the other rules project it down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.ops._define import LAYER_UPDATE_SCHEMA, contiguous, define
from bpfree_kernels.ops._layer import LayerGradients, LayerUpdate, check_dense
from bpfree_kernels.reference import classifier as reference
from bpfree_kernels.reference.classifier import LOSSES
from bpfree_kernels.update import LayerState, UpdateRule


class ClassifierOutput(NamedTuple):
    """What a classifier step returns.

    Attributes:
        output: probabilities (``ce``, ``bce``) or values (``mse``), [batch, classes].
        error: output minus one-hot label, unscaled, [batch, classes].
        loss: loss of each sample, [batch]; its mean is torch's loss of the batch.
    """

    output: Tensor
    error: Tensor
    loss: Tensor


def _fake(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    output = x.new_empty(x.shape[0], weight.shape[0])
    return output, torch.empty_like(output), x.new_empty(x.shape[0])


define(
    "classifier_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, str loss) -> (Tensor, Tensor, Tensor)",
    reference=reference.classifier_forward,
    fake=_fake,
    triton_module="bpfree_kernels.triton.classifier",
)
define(
    "classifier_step",
    "(Tensor x, Tensor(w!) weight, Tensor(b!)? bias, Tensor labels, str loss, "
    f"{LAYER_UPDATE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=reference.classifier_step,
    fake=_fake,
    triton_module="bpfree_kernels.triton.classifier",
)
define(
    "classifier_grad",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, str loss, "
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
    backend: str | None = None,
) -> ClassifierOutput:
    """Run an output layer and compare it with its labels; nothing learns.

    Args:
        x, weight, bias, labels, loss, backend: as in `classifier_step`; the batch may be empty.

    Returns:
        Output, error and loss.

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `classifier_step`.
    """
    _check(x, weight, bias, labels, loss, learns=False)
    body = backends.body("classifier_forward", x.device.type, backend)
    return ClassifierOutput(*body(*contiguous((x, weight, bias, labels)), loss))


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
        loss: ``"ce"``, ``"bce"`` or ``"mse"`` (see the module).
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        Output, error and loss, all of the weight before the update.

    Raises:
        IndexError: a label outside [0, classes), on the CPU (see `set_label_checks` for GPUs).
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown loss, state that
            is missing, or tensors that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    _check(x, weight, bias, labels, loss)
    layer = LayerUpdate(weight, bias, update, state)
    layer.check_disjoint(x=x, labels=labels)
    body = backends.body("classifier_step", x.device.type, backend)
    result = layer.run(body, (x.contiguous(),), (labels.contiguous(), loss))
    return ClassifierOutput(*result)


@torch.no_grad()
def classifier_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    loss: str = "ce",
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[ClassifierOutput, Tensor, Tensor | None]:
    """Run an output layer and return the gradients that `classifier_step` would apply.

    Args:
        x, weight, bias, labels, loss, backend: as in `classifier_step`.
        grad_weight: where the weight's gradient goes, [classes, in]; made if ``None``.
        grad_bias: where the bias's gradient goes, [classes]; made if ``None`` and there is a bias.
        accumulate: add to the gradients given instead of overwriting them.

    Returns:
        Output, error and loss; the gradient of the weight; that of the bias (``None`` without).

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `classifier_step`; ValueError also for
            ``accumulate`` without gradients to add to.
    """
    _check(x, weight, bias, labels, loss)
    grads = LayerGradients(weight, bias, grad_weight, grad_bias, accumulate)
    grads.check_disjoint(x=x, weight=weight, bias=bias, labels=labels)
    body = backends.body("classifier_grad", x.device.type, backend)
    tensors = (t if t is None else t.contiguous() for t in (x, weight, bias, labels))
    result = grads.run(body, (*tensors, loss))
    return ClassifierOutput(*result), grads.weight, grads.bias


def gradient_scale(loss: str, batch: int, classes: int) -> float:
    """Factor between the error y − t and the gradient of the batch's loss at z (the table above).

    With it, `dense_step` trains an output layer from an error that came from elsewhere.

    Args:
        loss: ``"ce"``, ``"bce"`` or ``"mse"``.
        batch: number of samples N.
        classes: number of classes C.

    Raises:
        ValueError: an unknown loss, or a batch or a number of classes below 1.
    """
    _check_loss(loss)
    if batch < 1 or classes < 1:
        raise ValueError(f"batch and classes must be at least 1, got {batch} and {classes}.")
    return reference.gradient_scale(loss, batch, classes)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    *,
    learns: bool = True,
) -> None:
    _check_loss(loss)
    check_dense(x, weight, bias, learns=learns)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must hold at least one class, got {tuple(weight.shape)}.")
    checks.labels(labels, x.shape[0], weight.shape[0], x.device)
