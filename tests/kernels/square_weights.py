"""Square weights near orthogonal ones, and what goes with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .golden import Array

SIZES = [1, 2, 7, 27, 48, 65, 100, 200]
"""Outputs: ones, odd ones, those of 3 × 3 windows of three channels, and more than one block."""

PRECISIONS = [torch.float32, torch.float64]


def tensors(dtype: torch.dtype, device: str, *values: Array) -> list[Tensor]:
    """The values as tensors of their own."""
    return [torch.tensor(value, dtype=dtype, device=device) for value in values]


def near_orthogonal(rng: np.random.Generator, size: int, noise: float) -> Array:
    """A square matrix `noise` away from an orthogonal one, in its largest singular value."""
    orthogonal = np.linalg.qr(rng.standard_normal((size, size)))[0]
    off = rng.standard_normal((size, size))
    return orthogonal + noise * off / np.linalg.norm(off, 2)


def weight_of(size: int, noise: float, seed: int = 0) -> Array:
    """A weight as of `near_orthogonal`, from a seed."""
    return near_orthogonal(np.random.default_rng(seed), size, noise)


def gram_of(size: int, norm: float, seed: int = 0) -> Array:
    """A symmetric matrix of this largest singular value."""
    values = np.random.default_rng(seed).standard_normal((size, size))
    return norm * (values + values.T) / np.linalg.norm(values + values.T, 2)


def signal_of(batch: int, size: int) -> Array:
    """A normal signal."""
    return np.random.default_rng(9).standard_normal((batch, size))
