"""Gradients cut to a length before they are applied: E6 of EKDAA's golden checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from .cases import RULES
from .test_update import draw
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")


def cut(grad: golden.Array, scale: float, max_norm: float) -> golden.Array:
    """``scale * grad``, re-scaled to the length `max_norm` if it is longer."""
    scaled = scale * grad
    length = np.sqrt((scaled**2).sum())
    return scaled * (max_norm / length) if length > max_norm else scaled


@pytest.mark.parametrize("scale", [1.0, -0.25])
@pytest.mark.parametrize("share", [0.3, 0.99, 1.01, 40.0])
@pytest.mark.parametrize("rule", ["sgd-decay", "adamw"])
def test_longer_gradients_are_cut(
    rule: str, share: float, scale: float, target: Target, dtype: torch.dtype
) -> None:
    """E6: ``scale * grad`` beyond `max_norm` comes down to that length, and keeps its direction."""
    backend, device = target
    param, (grad, *_) = draw((3, 5, 91), dtype, device)
    param *= 0.01
    most = share * abs(scale) * float(np.linalg.norm(to_numpy(grad)))
    start, update = param.clone(), cases.library_rule(RULES[rule])
    state = update.new_param_state(param)
    bk.apply_update(param, grad, update, state, scale=scale, max_norm=most, backend=backend)
    right = cut(to_numpy(grad), scale, most)
    here = torch.from_numpy(right).to(grad)
    exact = golden.update(RULES[rule], to_numpy(start), [right])
    check("param", param, exact.param, plain.update(RULES[rule], start, [here])[0])
    # Adam divides most of a length out again, and in half precision the two results lie too close
    if share < 0.5 and rule == "sgd-decay" and dtype.itemsize >= 4:
        left_long = golden.update(RULES[rule], to_numpy(start), [scale * to_numpy(grad)])
        with pytest.raises(AssertionError, match="param"):
            check("param", param, left_long.param, plain.update(RULES[rule], start, [here])[0])


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_shorter_gradients_are_left_alone(
    rule: str, scale: float, target: Target, dtype: torch.dtype
) -> None:
    """E6: up to `max_norm` every bit of parameter and state is as without it, at the length itself, too."""
    backend, device = target
    param, (grad, *_) = draw((4, 331), dtype, device)
    grad[0, :2], grad[1:], grad[0, 2:] = torch.tensor([3.0, -4.0]), 0.0, 0.0  # of length 5
    update = cases.library_rule(RULES[rule])
    results = []
    for most in (None, 5.0 * (1 if scale == 1 else 0.34), 1e30):
        mine, state = param.clone(), update.new_param_state(param)
        bk.apply_update(mine, grad, update, state, scale=scale, max_norm=most, backend=backend)
        results.append([mine, *(t for t in (state.m, state.v) if t is not None)])
    for result in results[1:]:
        assert all(torch.equal(got, free) for got, free in zip(result, results[0], strict=True))
    assert not torch.equal(results[0][0], param)


def test_nothing_to_cut(target: Target, dtype: torch.dtype) -> None:
    """E6: a gradient of 0 or of no elements is not divided by its length; it decays and no more."""
    backend, device = target
    param, _ = draw((4, 5), dtype, device)
    start = param.clone()
    zero = torch.zeros_like(param)
    bk.apply_update(param, zero, bk.SGD(0.5), max_norm=1e-3, backend=backend)
    assert torch.equal(param, start)
    bk.apply_update(param, zero, bk.SGD(0.5, weight_decay=0.5), max_norm=1e-3, backend=backend)
    check("param", param, 0.75 * to_numpy(start), 0.75 * start)
    empty = param[:0]
    bk.apply_update(empty, empty.clone(), bk.SGD(0.5), max_norm=1e-3, backend=backend)


def test_a_bad_gradient_is_not_hidden_by_cutting_it(target: Target) -> None:
    """NaN, which has no length, is not taken for 0: it shows where it is, and only there; so does ∞."""
    backend, device = target
    for value in (float("nan"), float("inf"), float("-inf")):
        param, (grad, *_) = draw((7, 400), torch.float32, device)
        grad[2, 3] = value
        bk.apply_update(param, grad, bk.SGD(0.1), max_norm=1.0, backend=backend)
        assert not torch.isfinite(param[2, 3])
        assert (~torch.isfinite(param)).sum() == 1


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_lengths_whose_squares_do_not_fit(size: float, target: Target) -> None:
    """The length is right where the squares in float32 would be 0 or infinite."""
    backend, device = target
    _, (grad, *_) = draw((3, 400), torch.float32, device)
    grad *= size
    most = 0.5 * float(np.linalg.norm(to_numpy(grad)))
    param = torch.zeros_like(grad)
    bk.apply_update(param, grad, bk.SGD(1.0), max_norm=most, backend=backend)
    check("param", param, -0.5 * to_numpy(grad), -0.5 * grad)


@pytest.mark.native
@pytest.mark.parametrize("count", [1_000_003, 3 * 2**20])
def test_cutting_a_large_gradient(count: int, target: Target) -> None:
    """The length of millions of equal entries, which a running float32 sum would miss by far."""
    backend, device = target
    grad = torch.full((count,), 0.1, device=device)
    most = 0.5 * 0.1 * count**0.5
    runs = []
    for _ in range(2):
        param = torch.zeros_like(grad)
        bk.apply_update(param, grad, bk.SGD(1.0), max_norm=most, backend=backend)
        runs.append(param)
    assert torch.equal(*runs)
    check("param", runs[0], np.full(count, -0.05), torch.full_like(grad, -0.05))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_cutting_through_any_layout(layout: str, target: Target) -> None:
    """The length is that of the gradient's own elements, and of nothing between them."""
    backend, device = target
    param, (grad, *_) = draw((3, 4, 5), torch.float32, device)
    most = 0.25 * float(np.linalg.norm(to_numpy(grad)))
    laid = layouts.laid_out(param, layout)
    gradient = layouts.laid_out(grad, layout).view
    bk.apply_update(laid.view, gradient, bk.SGD(1.0), max_norm=most, backend=backend)
    laid.check_surroundings()
    check("param", laid.view, to_numpy(param) - 0.25 * to_numpy(grad), param - 0.25 * grad)


def test_cutting_again_and_with_other_threads() -> None:
    """The same bits, again and with any number of threads, as the sum of squares depends on its order."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 7):
            torch.set_num_threads(count)
            param, (grad, *_) = draw((7, 40_001), torch.float32, "cpu")
            bk.apply_update(param, grad, bk.SGD(1.0), max_norm=3.0, backend="cpp")
            runs.append(param)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
