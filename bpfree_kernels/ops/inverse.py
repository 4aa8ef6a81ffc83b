"""Inverses of weights that stay nearly orthogonal, without an LU decomposition per step.

A square weight W, a layer's [out, in] or a convolution's taken as [out, in · kernel_h · kernel_w], has
G = W Wᵀ − I, which is 0 where W is orthogonal. W⁻ᵀ is what lies like W and carries a signal back::

    v W⁻ᵀ = v (I + G)⁻¹ W = (v − v G + v G² − …) W        a series, where ‖G‖ < 1
    X ← X + (I − X Wᵀ) X                                   Newton and Schulz, from X near W⁻ᵀ

The series costs one product of the batch for each term; the other needs two of the weight, but no
orthogonality, only the inverse of a step before. The regulariser λ ‖W Wᵀ − I‖² of GAIT-prop has the
gradient 4 λ G W: it shares G.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.ops._define import UPDATE_SCHEMA, contiguous, define
from bpfree_kernels.ops._layer import ParamUpdate
from bpfree_kernels.reference import inverse as reference
from bpfree_kernels.update import ParamState, UpdateRule

WORST_RESIDUAL = 1e-2
"""Largest residual of an inverse that `invert` returns: fewer than two digits are no inverse."""


class Solution(NamedTuple):
    """An approximate solution, and how far it is off.

    Attributes:
        value: the solution.
        residual: one element of value's dtype, on its device; see the op that returned it.
    """

    value: Tensor
    residual: Tensor


def _fake_orthogonality(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], weight.shape[0])


def _fake_solution(value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), value.new_empty(())


def _fake_refined(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_solution(inverse)


def _fake_update(*_: object) -> None:
    return None


define(
    "orthogonality",
    "(Tensor weight) -> Tensor",
    reference=reference.orthogonality,
    fake=_fake_orthogonality,
)
define(
    "solve_nearly_orthogonal",
    "(Tensor signal, Tensor orthogonality, float tolerance, int max_terms) -> (Tensor, Tensor)",
    reference=reference.solve_nearly_orthogonal,
    fake=_fake_solution,
)
define(
    "refine_inverse",
    "(Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
    reference=reference.refine_inverse,
    fake=_fake_refined,
)
define(
    "orthogonal_update",
    "(Tensor grad, Tensor orthogonality, Tensor(w!) weight, float penalty, bool off_diagonal, "
    f"{UPDATE_SCHEMA}) -> ()",
    reference=reference.orthogonal_update,
    fake=_fake_update,
)


@torch.no_grad()
def orthogonality(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """How far a square weight is from an orthogonal one: ``W @ W.T - I``, symmetric.

    Args:
        weight: [out, ...] with as many values for each output as there are outputs.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Returns:
        G, [out, out].

    Raises:
        TypeError: another dtype than float32 and float64.
        ValueError: a weight that is not square.
        RuntimeError: a backend that cannot run here.
    """
    check_square("weight", weight)
    body = backends.body("orthogonality", weight.device.type, backend)
    return cast(Tensor, body(weight.contiguous()))


@torch.no_grad()
def solve_nearly_orthogonal(
    signal: Tensor,
    orthogonality: Tensor,
    *,
    tolerance: float | None = None,
    max_terms: int = 12,
    backend: str | None = None,
) -> Solution:
    """Solve ``value @ (I + G) = signal`` by a series: ``value = signal - signal @ G + signal @ G @ G - …``.

    ``value @ W`` is then ``signal @ inv(W).T``. Converges where the largest singular value of G is below 1.

    Args:
        signal: v, [batch, out]; the batch may be empty.
        orthogonality: G of the weight, [out, out], symmetric.
        tolerance: residual at which the series ends; four units of rounding by default. On a GPU, where
            asking would wait for the device, all terms are computed whatever it is.
        max_terms: most products with G.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Returns:
        The solution, [batch, out], and ‖signal − value (I + G)‖ / ‖signal‖ of the solution without its last
        term: an upper bound where the series converges. Above `tolerance` (or not finite), it did not.

    Raises:
        TypeError: another dtype than float32 and float64, dtypes that differ, or `max_terms` that is no int.
        ValueError: shapes or devices that do not fit, or numbers out of range.
        RuntimeError: a backend that cannot run here.
    """
    _check_wide("orthogonality", orthogonality)
    checks.dims("signal", signal, 2, "[batch, out]")
    out = signal.shape[1]
    checks.shape("orthogonality", orthogonality, (out, out), "[out, out]")
    checks.same_kind("orthogonality", orthogonality, "signal", signal)
    tolerance = 4 * torch.finfo(signal.dtype).eps if tolerance is None else float(tolerance)
    _check_limits(tolerance, "max_terms", max_terms)
    body = backends.body("solve_nearly_orthogonal", signal.device.type, backend)
    return Solution(*body(*contiguous((signal, orthogonality)), tolerance, max_terms))


@torch.no_grad()
def refine_inverse(weight: Tensor, inverse: Tensor, *, backend: str | None = None) -> Solution:
    """One step of Newton and Schulz towards W⁻ᵀ: ``X + (I - X @ W.T) @ X``.

    Args:
        weight: W, [out, ...] with as many values for each output as there are outputs.
        inverse: X near W⁻ᵀ, shaped like `weight`.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Returns:
        The refined X, and ‖I − X Wᵀ‖ / √out of the X given, in Frobenius' norm; where the largest singular
        value of that difference is below 1, the refined X's is its square.

    Raises:
        TypeError: another dtype than float32 and float64, or dtypes that differ.
        ValueError: a weight that is not square, or shapes or devices that differ.
        RuntimeError: a backend that cannot run here.
    """
    check_square("weight", weight)
    checks.like("inverse", inverse, "weight", weight)
    body = backends.body("refine_inverse", weight.device.type, backend)
    return Solution(*body(*contiguous((weight, inverse))))


@torch.no_grad()
def invert(
    weight: Tensor,
    start: Tensor | None = None,
    *,
    tolerance: float | None = None,
    max_steps: int = 4,
    backend: str | None = None,
) -> Solution:
    """W⁻ᵀ, refined from an earlier one, or where that does not lead there, by an LU decomposition.

    Waits for the device, which has to be asked how good the inverse is.

    Args:
        weight: W, [out, ...] with as many values for each output as there are outputs.
        start: W⁻ᵀ of a weight close to W, shaped like it; ``None`` begins with the decomposition.
        tolerance: residual at which the refinement ends; 1e-5 by default, 1e-13 in float64.
        max_steps: most steps of `refine_inverse` before the decomposition.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Returns:
        W⁻ᵀ shaped like `weight`, and ‖I − W⁻ᵀ Wᵀ‖ / √out of the inverse before its last step.

    Raises:
        TypeError: another dtype than float32 and float64, dtypes that differ, or `max_steps` that is no int.
        ValueError: a weight that is not square, shapes or devices that differ, or numbers out of range.
        torch.linalg.LinAlgError: a weight that is singular, or too near to it for its dtype.
        RuntimeError: a backend that cannot run here.
    """
    check_square("weight", weight)
    if tolerance is None:
        tolerance = 1e-13 if weight.dtype == torch.float64 else 1e-5
    _check_limits(tolerance, "max_steps", max_steps)
    if start is not None:
        checks.like("start", start, "weight", weight)
        solution = _refine(weight, start, tolerance, max_steps, backend)
        if solution is not None:
            return solution
    decomposed, info = torch.linalg.inv_ex(weight.flatten(1))
    if info.item() == 0:
        start = decomposed.t().contiguous().view(weight.shape)
        solution = refine_inverse(weight, start, backend=backend)
        if solution.residual.item() <= WORST_RESIDUAL:  # false for NaN, too
            return solution
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"weight {tuple(weight.shape)} cannot be inverted in {weight.dtype}: its condition number is "
        f"{_condition(weight):.1e}."
    )


def _check_limits(tolerance: float, name: str, most: int) -> None:
    """Check where an approximation ends: at a residual, or after `most` terms or steps, called `name`."""
    if not isinstance(most, int) or isinstance(most, bool):
        raise TypeError(f"{name} must be an int, got {most!r}.")
    if most < 1:
        raise ValueError(f"{name} must be at least 1, got {most}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")


def _condition(weight: Tensor) -> float:
    """The largest singular value over the smallest: infinite where that is 0; NaN without finite ones."""
    if not torch.isfinite(weight).all():
        return math.nan
    values = torch.linalg.svdvals(weight.flatten(1).double()).tolist()
    return values[0] / values[-1] if values[-1] > 0 else math.inf


def _refine(
    weight: Tensor, start: Tensor, tolerance: float, max_steps: int, backend: str | None
) -> Solution | None:
    """`refine_inverse` until the residual is small; ``None`` if it does not become so."""
    before = float("inf")
    for _ in range(max_steps):
        solution = refine_inverse(weight, start, backend=backend)
        residual = solution.residual.item()
        if residual <= tolerance:
            return solution
        if not residual < before:
            return None
        start, before = solution.value, residual
    return None


@torch.no_grad()
def orthogonal_update(
    weight: Tensor,
    grad: Tensor,
    orthogonality: Tensor,
    update: UpdateRule,
    state: ParamState | None = None,
    *,
    penalty: float,
    off_diagonal: bool = False,
    backend: str | None = None,
) -> None:
    """Apply a gradient and that of the orthogonal regulariser to a weight, in one pass over it.

    The regulariser is penalty · Σ (W Wᵀ − I)², with the gradient 4 · penalty · G W. Equivalent to
    ``apply_update(weight, grad + 4 * penalty * G @ W, update, state)``.

    Args:
        weight: W, [out, ...] with as many values for each output as there are outputs, updated in place.
        grad: gradient of the loss, shaped like `weight`.
        orthogonality: G of the weight before the update, [out, out], symmetric.
        update: the update rule, e.g. ``Adam(lr=1.9e-5, eps=1e-6)``.
        state: what the rule remembers (``update.new_param_state(weight)``), updated in place.
        penalty: λ, at least 0.
        off_diagonal: leave the rows' lengths alone (Ahmad et al., 2020): the sum is over the entries off
            the diagonal, and so is G.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"`` instead of the device's default.

    Raises:
        TypeError: another dtype than float32 and float64, or dtypes that differ.
        ValueError: shapes or devices that do not fit, a negative penalty, state that is missing, or
            tensors that share memory with one that is updated.
        RuntimeError: a backend that cannot run here.
    """
    check_square("weight", weight)
    checks.like("grad", grad, "weight", weight)
    out = weight.shape[0]
    checks.shape("orthogonality", orthogonality, (out, out), "[out, out]")
    checks.same_kind("orthogonality", orthogonality, "weight", weight)
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty must be finite and not negative, got {penalty}.")
    parameter = ParamUpdate("weight", weight, update, state)
    parameter.check_disjoint(grad=grad, orthogonality=orthogonality)
    body = backends.body("orthogonal_update", weight.device.type, backend)
    read = tuple(contiguous((grad, orthogonality)))
    parameter.run(body, read, (float(penalty), off_diagonal))


def check_square(name: str, weight: Tensor) -> None:
    """Check a weight that has an inverse as far as its dtype and shape tell.

    Raises:
        TypeError: another dtype than float32 and float64.
        ValueError: no weight [out, ...] with as many values for each output as there are outputs.
    """
    _check_wide(name, weight)
    if weight.dim() < 2 or weight.numel() != weight.shape[0] ** 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{name} must have as many values for each output as there are outputs, got shape "
            f"{tuple(weight.shape)}."
        )


def _check_wide(name: str, value: Tensor) -> None:
    checks.tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        # What is near to I leaves nothing of G in eight or eleven bits.
        raise TypeError(f"{name} must be float32 or float64 to be inverted, got {value.dtype}.")
