"""The output layer against torch's own losses: outputs, errors, losses and gradients (D8)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import plain
from .cases import Snapshot, classifier_case, default_hinge
from .layouts import LAYOUTS, laid_out
from .tolerances import check, to_numpy

Target = tuple[str, str]

LOSSES = ("ce", "bce", "mse", "hinge")

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("loss", LOSSES)
def test_results(
    loss: str, target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """D8, D10, U4: everything that is returned, with the factors 1/N, 1/(N·C), 2/(N·C), 1/N."""
    backend, device = target
    case = classifier_case(shape, dtype, device, loss=loss)
    case.check(case.grad(backend))


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_loss_and_gradients_are_autograds(loss: str, target: Target) -> None:
    """The loss's mean is torch's loss, and the gradients are those of autograd in float64."""
    backend, device = target
    case = classifier_case((11, 9, 4, 0), device=device, loss=loss)
    outputs, *gradients = case.grad_op(*case.tensors.values(), loss=loss, backend=backend)
    x, weight, bias, labels = (
        t.double() if t.is_floating_point() else t for t in case.tensors.values()
    )
    leaves = weight.requires_grad_(), bias.requires_grad_()
    z = F.linear(x, *leaves)
    target_values = F.one_hot(labels, 4).double()
    mean = {
        "ce": lambda: F.cross_entropy(z, labels),
        "bce": lambda: F.binary_cross_entropy(z.sigmoid(), target_values),
        "mse": lambda: F.mse_loss(z, target_values),
        "hinge": lambda: plain.hinge(z, target_values, 1.0, 1 / 3).mean(),
    }[loss]()
    torch.testing.assert_close(outputs.loss.double().mean(), mean.detach(), rtol=1e-6, atol=1e-7)
    for got, wanted in zip(gradients, torch.autograd.grad(mean, leaves), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_lowers_the_loss(loss: str, target: Target, dtype: torch.dtype) -> None:
    """The sign: one SGD step moves against the gradient by lr times it."""
    backend, device = target
    case = classifier_case(dtype=dtype, device=device, loss=loss)
    before = case.clone()
    outputs = case.step(bk.SGD(lr=0.5), backend=backend)
    exact, by_torch = before.exact(), before.plain()
    before.check(outputs)
    for name, index in (("weight", -2), ("bias", -1)):
        old = before.tensors[name]
        wanted = to_numpy(old) - 0.5 * exact[index]
        check(name, case.tensors[name], wanted, old - 0.5 * by_torch[index])
    assert case.exact()[2].mean() < exact[2].mean()


@pytest.mark.parametrize("loss", ["ce", "bce", "hinge"])
def test_extreme_logits(loss: str, target: Target, dtype: torch.dtype) -> None:
    """Logits of ±1e4, of either sign at the label, equal ones, and ones with tiny differences."""
    backend, device = target
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 1.0],
            [-1e4, 1e4, 1e4, -1e4],
            [1e4, 1e4, 1e4, 1e4],
            [-1e4, -1e4, -1e4, -1e4],
            [1e4, 9992.0, 0.0, -0.0],
            [-88.0, -104.0, 88.0, 89.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
        dtype=dtype,
        device=device,
    )
    case = classifier_case((7, 4, 4, 0), dtype, device, loss=loss).using(
        x=logits,
        weight=torch.eye(4, dtype=dtype, device=device),
        bias=torch.zeros(4, dtype=dtype, device=device),
        labels=torch.tensor([1, 1, 2, 0, 1, 2, 3], device=device),
    )
    results = case.grad(backend)
    assert all(torch.isfinite(result).all() for result in results)
    case.check(results)


def test_confident_and_right_costs_nothing(target: Target, dtype: torch.dtype) -> None:
    """Cross-entropy of a certain, right answer: loss, error and gradient are exactly 0."""
    backend, device = target
    case = classifier_case((2, 2, 2, 0), dtype, device, loss="ce").using(
        x=torch.eye(2, dtype=dtype, device=device) * 1e4,
        weight=torch.eye(2, dtype=dtype, device=device),
        bias=torch.zeros(2, dtype=dtype, device=device),
        labels=torch.tensor([0, 1], device=device),
    )
    for result in case.grad(backend)[1:]:
        assert torch.count_nonzero(result) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_that_are_no_class(loss: str, target: Target) -> None:
    """Where nobody checks labels, one out of range is an all-zero target, never an address.

    For the hinge loss, all classes are others then.
    """
    backend, device = target
    case = classifier_case(device=device, loss=loss)
    huge = torch.iinfo(torch.int64)
    wild = torch.tensor([1, -1, 6, huge.max, huge.min], device=device)
    case = case.using(labels=wild)
    grads = torch.full_like(case.weight, float("nan")), torch.full_like(case.bias, float("nan"))
    body = backends.body("classifier_grad", device, backend)
    options = default_hinge(6, *case.options.values())
    results = (*body(*case.tensors.values(), loss, *options, *grads, False), *grads)
    for index, (got, wanted) in enumerate(zip(results, case.exact(), strict=True)):
        check(f"result {index}", got, wanted, torch.from_numpy(wanted).to(got.dtype))


def test_forward(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """The forward pass alone gives what the gradient's does, to the bit, and changes nothing."""
    backend, device = target
    # every loss, with a bias and without
    loss, bias = LOSSES[(shape[1] + shape[2]) % 4], shape[0] % 2 == 1
    case = classifier_case(shape, dtype, device, loss=loss, bias=bias)
    snapshot = Snapshot(case.tensors)
    outputs = bk.classifier_forward(**case.tensors, loss=loss, backend=backend)
    assert isinstance(outputs, bk.ClassifierOutput)
    case.check(outputs)
    for got, wanted in zip(outputs, case.grad(backend), strict=False):
        assert torch.equal(got, wanted)
    snapshot.check_unchanged()


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_of_nothing(loss: str, target: Target, dtype: torch.dtype) -> None:
    """No samples: empty outputs. No inputs: those of the bias."""
    backend, device = target
    case = classifier_case((0, 7, 6, 0), dtype, device, loss=loss)
    outputs = bk.classifier_forward(**case.tensors, loss=loss, backend=backend)
    assert [tuple(t.shape) for t in outputs] == [(0, 6), (0, 6), (0,)]
    assert all(t.dtype == dtype for t in outputs)
    case = classifier_case((5, 0, 6, 0), dtype, device, loss=loss)
    case.check(bk.classifier_forward(**case.tensors, loss=loss, backend=backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_in_any_layout(layout: str, target: Target) -> None:
    """Everything that is read may lie in memory in any way, and needs no graph."""
    backend, device = target
    case = classifier_case((6, 10, 9, 0), device=device)
    views = {name: laid_out(tensor, layout).view for name, tensor in case.tensors.items()}
    views["x"] = views["x"].detach().requires_grad_()
    outputs = bk.classifier_forward(**views, backend=backend)
    case.check(outputs)
    assert not any(t.requires_grad for t in outputs)


def test_outputs_have_names(target: Target) -> None:
    """The result is a named tuple of what the documentation names."""
    backend, device = target
    case = classifier_case(device=device)
    outputs, _, _ = bk.classifier_grad(*case.tensors.values(), backend=backend)
    assert isinstance(outputs, bk.ClassifierOutput)
    assert outputs.output.shape == outputs.error.shape == (5, 6)
    assert outputs.loss.shape == (5,)
    rows = outputs.output.sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


WRONG: dict[str, Any] = {
    "flipped error": lambda y, e, loss, dw, db: (y, -e, loss, dw, db),
    "flipped gradient": lambda y, e, loss, dw, db: (y, e, loss, -dw, -db),
    "sum over the batch": lambda y, e, loss, dw, db: (y, e, loss, dw * 5, db * 5),
    "scaled error": lambda y, e, loss, dw, db: (y, e / 5, loss, dw, db),
    "sum over classes": lambda y, e, loss, dw, db: (y, e, loss * 6, dw, db),
    "half": lambda y, e, loss, dw, db: (y, e, loss, dw / 2, db / 2),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, loss: str) -> None:
    """The comparison above has teeth: a wrong sign or factor fails it, even in bfloat16."""
    case = classifier_case(dtype=torch.bfloat16, loss=loss)
    right = case.exact()
    case.check(torch.from_numpy(np.asarray(result)).bfloat16() for result in right)
    with pytest.raises(AssertionError, match=r"result \d"):
        case.check(torch.from_numpy(result).bfloat16() for result in WRONG[wrong](*right))
