"""Inverses of nearly orthogonal weights: G10 of GAIT-prop's golden checks, series, refinement and fall-back.

The regulariser that keeps weights so is in `test_orthogonal_update`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import cases, layouts
from . import golden_invertible as exact
from .local_layers import arrays
from .square_weights import PRECISIONS, SIZES, gram_of, signal_of, tensors, weight_of
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.op("orthogonality"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_orthogonality(size: int, precision: torch.dtype, target: Target) -> None:
    """W Wᵀ − I, symmetric to the bit; its entries to the digits of the products in them."""
    backend, device = target
    for noise in (5.0, 0.01):
        (weight,) = tensors(precision, device, weight_of(size, noise))
        snapshot = cases.Snapshot({"weight": weight})
        got = bk.orthogonality(weight, backend=backend)
        rows, unit = to_numpy(weight), np.eye(size)
        wanted = np.einsum("ik,jk->ij", rows, rows) - unit
        here = weight @ weight.t() - torch.eye(size, dtype=precision, device=device)
        largest = np.abs(wanted + unit).max()
        check("G", got, wanted, here, scale=np.full_like(wanted, largest) if size > 1 else largest)
        assert torch.equal(got, got.t())
        snapshot.check_unchanged()


@pytest.mark.parametrize("shape_of_weight", [(12, 2, 3, 2), (18, 2, 3, 3), (8, 8), (6, 6, 1)])
def test_shapes_of_weights(shape_of_weight: tuple[int, ...], target: Target) -> None:
    """A convolution's weight is the square one of its windows, and its inverse lies as it does."""
    backend, device = target
    out = shape_of_weight[0]
    (square,) = tensors(torch.float64, device, weight_of(out, 0.2))
    weight = square.view(shape_of_weight)
    gram = bk.orthogonality(weight, backend=backend)
    assert torch.equal(gram, bk.orthogonality(square, backend=backend))
    for start in (None, weight):
        inverse = bk.invert(weight, start, backend=backend).value
        assert inverse.shape == weight.shape
        wanted = exact.inverse_of(to_numpy(weight))
        np.testing.assert_allclose(to_numpy(inverse), wanted, rtol=0, atol=1e-12)
    refined = bk.refine_inverse(weight, weight, backend=backend).value
    assert torch.equal(refined.flatten(1), bk.refine_inverse(square, square, backend=backend).value)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("batch", "size"), [(5, n) for n in SIZES] + [(1, 27), (130, 48)])
def test_solution(batch: int, size: int, precision: torch.dtype, target: Target) -> None:
    """v (I + G)⁻¹, as `numpy.linalg.solve` has it; times W it is v W⁻ᵀ."""
    backend, device = target
    weight, signal = tensors(precision, device, weight_of(size, 0.1), signal_of(batch, size))
    gram = bk.orthogonality(weight, backend=backend)
    snapshot = cases.Snapshot({"signal": signal, "orthogonality": gram})
    value, residual = bk.solve_nearly_orthogonal(signal, gram, max_terms=60, backend=backend)
    snapshot.check_unchanged()
    v, g, w = arrays(signal, gram, weight)
    wanted = np.linalg.solve(np.eye(size) + g, v.T).T
    unit = torch.eye(size, dtype=precision, device=device)
    check("value", value, wanted, torch.linalg.solve(unit + gram, signal, left=False))
    eps = torch.finfo(precision).eps
    assert residual.shape == ()
    assert residual.dtype == precision
    assert residual.item() <= 4 * eps
    carried = to_numpy(value @ weight) - v @ np.linalg.inv(w).T
    assert np.abs(carried).max() < 200 * eps * np.abs(v).max()


def test_series_ends_at_its_tolerance(target: Target) -> None:
    """With G = I / 2 each term halves: on a CPU the fifth is the last that 1/20 asks for, exactly."""
    backend, device = target
    signal, gram = tensors(torch.float32, device, signal_of(3, 4), np.eye(4) / 2)

    def solve(tolerance: float, max_terms: int) -> bk.Solution:
        return bk.solve_nearly_orthogonal(
            signal, gram, tolerance=tolerance, max_terms=max_terms, backend=backend
        )

    ended = solve(0.05, 9)
    terms = 5 if device == "cpu" else 9
    torch.testing.assert_close(
        ended.value, signal * sum((-0.5) ** k for k in range(terms + 1)), rtol=3e-7, atol=0
    )
    assert ended.residual.item() == pytest.approx(0.5**terms, rel=1e-6)
    for terms in (1, 2, 7):
        assert solve(0.0, terms).residual.item() == pytest.approx(0.5**terms, rel=1e-6)


@pytest.mark.parametrize("norm", [0.05, 0.4, 0.9, 0.99])
@pytest.mark.parametrize("max_terms", [1, 2, 5, 12])
def test_residual_is_an_upper_bound(norm: float, max_terms: int, target: Target) -> None:
    """What is returned is the residual without the last term, in every digit: the true one is below."""
    backend, device = target
    v, g = signal_of(5, 17), gram_of(17, norm)
    signal, gram = tensors(torch.float64, device, v, g)
    value, residual = bk.solve_nearly_orthogonal(
        signal, gram, tolerance=0, max_terms=max_terms, backend=backend
    )
    before = v @ np.linalg.matrix_power(g, max_terms)
    wanted = np.linalg.norm(before) / np.linalg.norm(v)
    assert residual.item() == pytest.approx(wanted, rel=1e-10)
    true = np.linalg.norm(v - to_numpy(value) @ (np.eye(17) + g)) / np.linalg.norm(v)
    assert true <= residual.item() + 1e-15


@pytest.mark.parametrize("precision", PRECISIONS)
def test_divergence_shows(precision: torch.dtype, target: Target) -> None:
    """‖G‖ > 1: the residual says so; NaN in the signal or in G is NaN in the residual."""
    backend, device = target
    signal, gram = tensors(precision, device, signal_of(5, 17), gram_of(17, 1.5))
    assert bk.solve_nearly_orthogonal(signal, gram, backend=backend).residual.item() > 1
    for spoilt in (0, 1):
        pair = [signal.clone(), gram.clone()]
        pair[spoilt][1, 2] = math.nan
        assert math.isnan(bk.solve_nearly_orthogonal(*pair, backend=backend).residual.item())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [0, 5])
def test_no_signal(batch: int, precision: torch.dtype, target: Target) -> None:
    """Nothing to solve for is solved by nothing, whatever G is: not 0 / 0."""
    backend, device = target
    signal, gram = tensors(precision, device, np.zeros((batch, 7)), gram_of(7, 3.0))
    value, residual = bk.solve_nearly_orthogonal(signal, gram, backend=backend)
    assert value.shape == (batch, 7)
    assert torch.count_nonzero(value) == 0
    assert residual.item() == 0


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_signals_whose_squares_do_not_fit(size: float, target: Target) -> None:
    """The series goes on, and its residual is right, where squares in float32 would be 0 or infinite."""
    backend, device = target
    signal, gram = tensors(torch.float32, device, signal_of(5, 17), gram_of(17, 0.3))
    wanted = bk.solve_nearly_orthogonal(signal, gram, backend=backend)
    got = bk.solve_nearly_orthogonal(size * signal, gram, backend=backend)
    torch.testing.assert_close(got.value / size, wanted.value, rtol=1e-5, atol=1e-6)
    assert 0 < got.residual.item() == pytest.approx(wanted.residual.item(), rel=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_refinement(size: int, precision: torch.dtype, target: Target) -> None:
    """X + (I − X Wᵀ) X, and ‖I − X Wᵀ‖ / √out of the X that was given."""
    backend, device = target
    values = weight_of(size, 0.3), weight_of(size, 0.3, seed=1)
    weight, start = tensors(precision, device, *values)
    start += weight  # so that nothing is small, and nothing cancels
    snapshot = cases.Snapshot({"weight": weight, "inverse": start})
    value, residual = bk.refine_inverse(weight, start, backend=backend)
    snapshot.check_unchanged()
    w, x = arrays(weight, start)
    missing = np.eye(size) - x @ w.T
    unit = torch.eye(size, dtype=precision, device=device)
    check("value", value, x + missing @ x, start + (unit - start @ weight.t()) @ start)
    eps = torch.finfo(precision).eps
    wanted = np.linalg.norm(missing) / math.sqrt(size)
    assert residual.shape == ()
    assert residual.dtype == precision
    assert residual.item() == pytest.approx(wanted, rel=100 * eps)


def test_refinement_converges_quadratically(target: Target) -> None:
    """Each step squares the largest singular value of I − X Wᵀ, down to rounding."""
    backend, device = target
    w = weight_of(8, 0.3)
    weight, value = tensors(torch.float64, device, w, w)
    largest = [np.linalg.norm(np.eye(8) - w @ w.T, 2)]
    assert 0.1 < largest[0] < 0.9
    for _ in range(6):
        value = bk.refine_inverse(weight, value, backend=backend).value
        largest.append(np.linalg.norm(np.eye(8) - to_numpy(value) @ w.T, 2))
        assert largest[-1] == pytest.approx(largest[-2] ** 2, rel=1e-6, abs=1e-14)
    assert largest[-1] < 1e-14


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inverse_of_a_drifting_weight(precision: torch.dtype, target: Target) -> None:
    """G10: one refinement per step follows a weight that drifts; without them the inverse is lost."""
    backend, device = target
    rng = np.random.default_rng(3)
    w = weight_of(27, 0.2)
    weight, value = tensors(precision, device, w, np.linalg.inv(w).T)
    stale = to_numpy(value)
    for _ in range(20):
        weight += torch.from_numpy(1e-4 * rng.standard_normal((27, 27))).to(weight)
        missing = np.linalg.norm(np.eye(27) - to_numpy(value) @ to_numpy(weight).T, 2)
        assert missing < 0.01
        value = bk.refine_inverse(weight, value, backend=backend).value
        wanted = np.linalg.inv(to_numpy(weight)).T
        bound = missing**2 * np.linalg.norm(wanted, 2) + 100 * torch.finfo(precision).eps
        assert np.linalg.norm(to_numpy(value) - wanted, 2) < bound
    assert np.linalg.norm(stale - wanted, 2) > 20 * bound


@pytest.mark.parametrize("start", [None, "earlier", "zeros", "far", "nan"])
@pytest.mark.parametrize(("precision", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_invert(start: str | None, precision: torch.dtype, bound: float, target: Target) -> None:
    """The inverse from an earlier one; from none, or one that leads nowhere, by decomposition."""
    backend, device = target
    w = weight_of(27, 0.4)
    weight, inverse = tensors(precision, device, w, np.linalg.inv(w + 1e-3).T)
    starts = {
        None: None, "earlier": inverse, "zeros": 0 * inverse, "far": 5 * weight,
        "nan": math.nan * inverse,
    }  # fmt: skip
    arguments = {"weight": weight, "start": starts[start]}
    snapshot = cases.Snapshot(arguments)
    value, residual = bk.invert(**arguments, backend=backend)
    snapshot.check_unchanged()
    wanted = np.linalg.inv(to_numpy(weight)).T
    assert np.abs(to_numpy(value) - wanted).max() < bound
    assert residual.item() < bound


def test_invert_does_what_it_is_told(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more steps than `max_steps`, none beyond `tolerance`, and no decomposition where they do."""
    backend, device = target
    w = weight_of(8, 0.3)
    weight, start = tensors(torch.float64, device, w, w)
    one = bk.refine_inverse(weight, start, backend=backend)
    two = bk.refine_inverse(weight, one.value, backend=backend)
    decomposed: list[Tensor] = []
    invert = torch.linalg.inv_ex

    def counted(matrix: Tensor) -> Any:
        decomposed.append(matrix)
        return invert(matrix)

    monkeypatch.setattr(torch.linalg, "inv_ex", counted)
    got = bk.invert(weight, start, tolerance=1.0, backend=backend)
    assert torch.equal(got.value, one.value)
    got = bk.invert(weight, start, tolerance=two.residual.item(), backend=backend)
    assert torch.equal(got.value, two.value)
    assert not decomposed
    bk.invert(weight, start, max_steps=2, backend=backend)
    assert len(decomposed) == 1


HILBERT = 1 / (np.arange(12)[:, None] + np.arange(12) + 1.0)
"""Of condition number 1.7e16."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("started", [False, True])
def test_weights_without_an_inverse(started: bool, precision: torch.dtype, target: Target) -> None:
    """Singular, nearly singular or not finite: an error that names the condition number."""
    backend, device = target
    nan = np.eye(12)
    nan[3, 4] = np.nan
    twins = weight_of(12, 0.1)
    twins[5] = twins[7]
    for values, condition in (
        (np.zeros((12, 12)), r"inf\."), (HILBERT, r"\d\.\de\+(09|1\d)\."),
        (nan, r"nan\."), (np.inf * np.ones((12, 12)), r"nan\."), (twins, r"(inf|\d\.\de\+\d\d)\."),
    ):  # fmt: skip
        weight, start = tensors(precision, device, values, np.eye(12))
        name = str(precision).replace(".", r"\.")
        wanted = rf"weight \(12, 12\).*{name}.*condition number is {condition}"
        with pytest.raises(torch.linalg.LinAlgError, match=wanted):
            bk.invert(weight, start if started else None, backend=backend)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts(layout: str, target: Target) -> None:
    """Everything may lie in memory in any way, and is not touched."""
    backend, device = target
    values = weight_of(12, 0.2), gram_of(12, 0.3), signal_of(5, 12)
    weight, gram, signal = tensors(torch.float32, device, *values)
    weight = weight.view(12, 2, 3, 2)
    w, apart, v = (layouts.laid_out(t, layout) for t in (weight, gram, signal))
    how: dict[str, Any] = {"backend": backend}
    pairs = [
        (bk.orthogonality(w.view, **how), bk.orthogonality(weight, **how)),
        *zip(
            bk.solve_nearly_orthogonal(v.view, apart.view, **how),
            bk.solve_nearly_orthogonal(signal, gram, **how), strict=True,
        ),
        *zip(
            bk.refine_inverse(w.view, w.view, **how), bk.refine_inverse(weight, weight, **how),
            strict=True,
        ),
    ]  # fmt: skip
    for laid, straight in pairs:
        assert torch.equal(laid, straight)
    for entry in (w, apart, v):
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled() -> None:
    """Carry a signal down, refine the inverse, and update the weight, in one graph."""

    def learn(weight: Tensor, grad: Tensor, signal: Tensor) -> list[Tensor]:
        gram = bk.orthogonality(weight)
        carried = bk.solve_nearly_orthogonal(signal, gram, max_terms=3)
        refined = bk.refine_inverse(weight, weight)
        bk.orthogonal_update(weight, grad, gram, bk.SGD(0.1), penalty=0.5)
        return [*carried, *refined]

    values = weight_of(7, 0.2), weight_of(7, 3.0, seed=1), signal_of(5, 7)
    eager, traced = (tensors(torch.float32, "cpu", *values) for _ in range(2))
    compiled = torch.compile(learn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*traced), learn(*eager))
    torch.testing.assert_close(traced, eager)
    assert not torch.equal(eager[0], tensors(torch.float32, "cpu", values[0])[0])
