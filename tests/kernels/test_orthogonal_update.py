"""Update rules with the orthogonal regulariser: G6 of GAIT-prop's golden checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, layouts, plain
from . import golden_invertible as exact
from .cases import RULES
from .local_layers import arrays
from .square_weights import PRECISIONS, SIZES, gram_of, tensors, weight_of
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.op("orthogonal_update"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning"),
]


def apply(
    rule: bk.SGD | bk.Adam, weight: Tensor, grad: Tensor, gram: Tensor, backend: str, **how: Any
) -> bk.ParamState:
    """Two updates in place; returns the state."""
    state = rule.new_param_state(weight)
    for size in (1, -2):
        bk.orthogonal_update(weight, size * grad, gram, rule, state, backend=backend, **how)
    return state


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("off_diagonal", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_update(rule: str, off_diagonal: bool, precision: torch.dtype, target: Target) -> None:
    """Every rule on grad + 4 λ G W: the state, too."""
    backend, device = target
    values = weight_of(18, 0.4), weight_of(18, 3.0, seed=1), gram_of(18, 2.0)
    weight, grad, gram = tensors(precision, device, *values)
    weight, grad = weight.view(18, 2, 3, 3), grad.view(18, 2, 3, 3)
    start, given = weight.clone(), cases.Snapshot({"grad": grad, "orthogonality": gram})
    how: dict[str, Any] = {"penalty": 0.3, "off_diagonal": off_diagonal}
    state = apply(cases.library_rule(RULES[rule]), weight, grad, gram, backend, **how)
    given.check_unchanged()
    w, g, apart = arrays(start, grad, gram)
    right = [g + 0.3 * exact.penalty_gradient(w, apart, off_diagonal)]
    moved = golden.update(RULES[rule], w, right).param
    right.append(-2 * g + 0.3 * exact.penalty_gradient(moved, apart, off_diagonal))
    wanted = golden.update(RULES[rule], w, right)
    by_torch = plain.update(RULES[rule], start, tensors(precision, device, *right))[0]
    check("weight", weight, wanted.param, by_torch)
    for name, kept in (("m", state.m), ("v", state.v)):
        if kept is not None:
            moment = getattr(wanted, name)
            check(name, kept, moment, torch.from_numpy(moment).to(kept))
    assert state.step is None or state.step.item() == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("off_diagonal", [False, True])
def test_update_is_apply_update(size: int, off_diagonal: bool, target: Target) -> None:
    """``apply_update`` of grad + 4 λ G W, at sizes around every block edge; λ = 0 to a few bits."""
    backend, device = target
    values = weight_of(size, 0.4), weight_of(size, 3.0, seed=1), gram_of(size, 2.0)
    rule = bk.SGD(0.05, momentum=0.9, weight_decay=0.1)
    for penalty in (0.0, 0.7):
        weight, grad, gram = tensors(torch.float64, device, *values)
        other = weight.clone()
        masked = gram - torch.diag(gram.diagonal()) if off_diagonal else gram
        bk.apply_update(
            other, grad + 4 * penalty * masked @ weight, rule, rule.new_param_state(weight)
        )
        bk.orthogonal_update(
            weight, grad, gram, rule, rule.new_param_state(weight), penalty=penalty,
            off_diagonal=off_diagonal, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(weight, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("off_diagonal", [False, True])
def test_gradient_of_the_penalty(off_diagonal: bool, target: Target) -> None:
    """G6: λ times the slope of Σ (W Wᵀ − I)² along every entry of W."""
    backend, device = target
    w = weight_of(6, 0.5)
    weight, nothing = tensors(torch.float64, device, w, np.zeros((6, 6)))
    gram = bk.orthogonality(weight, backend=backend)
    bk.orthogonal_update(
        weight, nothing, gram, bk.SGD(1.0), penalty=0.7, off_diagonal=off_diagonal, backend=backend
    )
    slopes, step = np.zeros_like(w), 1e-5
    for entry in np.ndindex(*w.shape):
        off = np.zeros_like(w)
        off[entry] = step
        above, below = (exact.penalty(w + sign * off, off_diagonal) for sign in (1, -1))
        slopes[entry] = (above - below) / (2 * step)
    np.testing.assert_allclose(w - to_numpy(weight), 0.7 * slopes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts(layout: str, target: Target) -> None:
    """Weight, gradient and moments in any memory layout; nothing beside what is updated is written."""
    backend, device = target
    values = weight_of(12, 0.2), weight_of(12, 3.0, seed=1), gram_of(12, 0.3)
    weight, grad, gram = tensors(torch.float32, device, *values)
    weight, grad = weight.view(12, 2, 3, 2), grad.view(12, 2, 3, 2)
    laid = [layouts.laid_out(t, layout) for t in (weight, grad, gram)]
    rule = bk.Adam(0.1)
    kept, straight = (rule.new_param_state(weight) for _ in range(2))
    moments = [layouts.laid_out(moment, layout) for moment in (kept.m, kept.v)]
    kept.m, kept.v = (moment.view for moment in moments)
    for state, read in ((kept, [entry.view for entry in laid]), (straight, [weight, grad, gram])):
        bk.orthogonal_update(*read, rule, state, penalty=0.5, backend=backend)
    for entry, wanted in zip((laid[0], *moments), (weight, straight.m, straight.v), strict=True):
        assert torch.equal(entry.view, wanted)
        entry.check_surroundings()
    for entry in laid[1:]:
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.parametrize("dtype_of_lr", PRECISIONS)
def test_learning_rate_as_a_tensor(dtype_of_lr: torch.dtype, target: Target) -> None:
    """One element of either precision, read anew at every call."""
    backend, device = target
    values = weight_of(7, 0.2), weight_of(7, 3.0, seed=1), gram_of(7, 0.3)
    lr = torch.full((), 99.0, dtype=dtype_of_lr)
    results = []
    for rate in (lr, 0.25):
        rule = bk.Adam(rate)
        lr.fill_(0.25)
        weight, grad, gram = tensors(torch.float32, device, *values)
        apply(rule, weight, grad, gram, backend, penalty=0.5)
        results.append(weight)
    assert torch.equal(*results)


def test_the_weight_counts_as_changed(target: Target) -> None:
    """Version counters move for what is updated, and for nothing else."""
    backend, device = target
    values = weight_of(7, 0.2), weight_of(7, 3.0, seed=1), gram_of(7, 0.3)
    weight, grad, gram = tensors(torch.float32, device, *values)
    before = [t._version for t in (weight, grad, gram)]
    apply(bk.SGD(0.1), weight, grad, gram, backend, penalty=0.5)
    after = [t._version for t in (weight, grad, gram)]
    assert after[0] > before[0]
    assert after[1:] == before[1:]
