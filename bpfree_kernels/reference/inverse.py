"""Inverses of nearly orthogonal weights in plain PyTorch (equations: `bpfree_kernels.ops.inverse`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpfree_kernels.reference.update import apply_rule


def orthogonality(weight: Tensor) -> Tensor:
    """W Wᵀ − I."""
    rows = weight.flatten(1)
    gram = rows @ rows.t()  # whose last digits need not be symmetric
    return gram.triu() + gram.triu(1).t() - _identity(rows)


def solve_nearly_orthogonal(
    signal: Tensor, orthogonality: Tensor, tolerance: float, max_terms: int
) -> tuple[Tensor, Tensor]:
    """The series for v (I + G)⁻¹, and the size of its last term."""
    value, term = signal.clone(), signal
    size = _length(signal)
    residual = torch.zeros_like(size)
    for _ in range(max_terms):
        term = -(term @ orthogonality)
        value += term
        residual = torch.where(size > 0, _length(term) / size, size)
        if not value.is_cuda and residual <= tolerance:
            break
    return value, residual.to(signal.dtype)


def refine_inverse(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """X + (I − X Wᵀ) X and ‖I − X Wᵀ‖ / √out."""
    rows, start = weight.flatten(1), inverse.flatten(1)
    missing = _identity(rows) - start @ rows.t()
    residual = torch.linalg.vector_norm(missing) / rows.shape[0] ** 0.5
    return (start + missing @ start).view(inverse.shape), residual


def orthogonal_update(
    grad: Tensor,
    orthogonality: Tensor,
    weight: Tensor,
    penalty: float,
    off_diagonal: bool,
    *update: Any,
) -> None:
    """The weight and its state updated in place; `update` is the rule and the state."""
    if off_diagonal:
        orthogonality = orthogonality - torch.diag(orthogonality.diagonal())
    regular = (orthogonality @ weight.flatten(1)).view(weight.shape)
    apply_rule(weight, grad + 4 * penalty * regular, *update)


def _length(signal: Tensor) -> Tensor:
    """‖signal‖, also where squares in its dtype would be 0 or infinite."""
    length: Tensor = torch.linalg.vector_norm(signal, dtype=torch.float64)
    return length


def _identity(rows: Tensor) -> Tensor:
    return torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
