"""The multi-class hinge loss of the output layer: its thresholds, its two options (U4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bpfree_kernels as bk

from .cases import LayerCase, classifier_case
from .tolerances import to_numpy

Target = tuple[str, str]

OPTIONS = [(None, None), (0.5, None), (None, 0.25), (2.0, 3.0), (0.0, 0.0)]

pytestmark = pytest.mark.usefixtures("poisoned")


def at_thresholds(
    classes: int,
    dtype: torch.dtype,
    device: str,
    margin: float | None,
    off_class: float | None,
) -> LayerCase:
    """Logits exactly on ±margin, the next numbers on either side, and some farther away."""
    case = classifier_case(
        (40, classes, classes, 0), dtype, device, loss="hinge", margin=margin, off_class=off_class
    )
    edge, eps = 1.0 if margin is None else margin, torch.finfo(dtype).eps
    near = [edge, edge * (1 + eps), edge * (1 - eps / 2)]
    values = torch.tensor([*near, *(-value for value in near), 0.0, 3.5, -3.5], dtype=torch.float64)
    chosen = np.random.default_rng(classes).integers(0, len(values), (40, classes))
    return case.using(
        x=values[chosen].to(device, dtype),
        weight=torch.eye(classes, dtype=dtype, device=device),
        bias=torch.zeros(classes, dtype=dtype, device=device),
    )


@pytest.mark.parametrize(("margin", "off_class"), OPTIONS)
@pytest.mark.parametrize("classes", [1, 2, 10, 130])
def test_thresholds_keep_their_gradient(
    classes: int,
    margin: float | None,
    off_class: float | None,
    target: Target,
    dtype: torch.dtype,
) -> None:
    """U4: equality learns, the next number beyond it does not; in every dtype, to the last bit."""
    backend, device = target
    case = at_thresholds(classes, dtype, device, margin, off_class)
    results = case.grad(backend)
    case.check(results)
    error = case.exact()[1]
    np.testing.assert_array_equal(np.sign(to_numpy(results[1])), np.sign(error))
    own = np.take_along_axis(error, to_numpy(case.tensors["labels"])[:, None].astype(int), 1)
    assert set(own.ravel()) == {0.0, -1.0}  # samples on both sides of the threshold


@pytest.mark.parametrize(("margin", "off_class"), OPTIONS)
def test_options_of_every_function(
    margin: float | None, off_class: float | None, target: Target
) -> None:
    """Forward and step take margin and μ as the gradient does."""
    backend, device = target
    case = classifier_case(device=device, loss="hinge", margin=margin, off_class=off_class)
    outputs = bk.classifier_forward(**case.tensors, **case.options, backend=backend)
    case.check(outputs)
    exact, before = case.exact(), to_numpy(case.weight)
    for got, wanted in zip(case.step(bk.SGD(lr=0.5), backend=backend), outputs, strict=True):
        assert torch.equal(got, wanted)
    np.testing.assert_allclose(
        to_numpy(case.weight), before - 0.5 * exact[-2], rtol=1e-5, atol=1e-6
    )


def test_a_single_class_has_no_others(target: Target) -> None:
    """C = 1: μ is 0 by default, and 1 / (C − 1) is not formed."""
    backend, device = target
    case = classifier_case((6, 3, 1, 0), device=device, loss="hinge")
    outputs = bk.classifier_forward(**case.tensors, loss="hinge", backend=backend)
    logits = outputs.output[:, 0]
    torch.testing.assert_close(outputs.loss, (1 - logits).clamp(min=0))


def test_a_logit_that_is_no_number_shows_in_the_loss(target: Target) -> None:
    """max(NaN, 0) is NaN: a run that diverged does not look like one that is done."""
    backend, device = target
    case = classifier_case((6, 3, 4, 0), device=device, loss="hinge")
    bias = case.tensors["bias"].clone()
    bias[1] = float("nan")
    outputs = bk.classifier_forward(**case.using(bias=bias).tensors, loss="hinge", backend=backend)
    assert outputs.loss.isnan().all()


def test_compiles_whole() -> None:
    """A graph without breaks, with the options as constants, gives the same bits."""
    case = classifier_case(loss="hinge", margin=0.5, off_class=0.25)

    def run(**tensors: Any) -> Any:
        return bk.classifier_grad(**tensors, **case.options)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (got, *of_got), (wanted, *of_wanted) = compiled(**case.tensors), run(**case.tensors)
    for mine, theirs in zip((*got, *of_got), (*wanted, *of_wanted), strict=True):
        assert torch.equal(mine, theirs)
