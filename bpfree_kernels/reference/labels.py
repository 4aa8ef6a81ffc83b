"""Class labels in plain PyTorch. A label out of range means "no class", as in every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(rows: Tensor, labels: Tensor) -> Tensor:
    """rows[label] for each sample, zeros where the label is out of range; [batch, *rows.shape[1:]]."""
    known = (labels >= 0) & (labels < rows.shape[0])
    picked = rows[labels.clamp(0, rows.shape[0] - 1).long()]
    return torch.where(known.view(-1, *[1] * (rows.dim() - 1)), picked, torch.zeros_like(picked))


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot targets, [batch, classes]; a row of zeros where the label is out of range."""
    return gather_rows(torch.eye(classes, dtype=dtype, device=labels.device), labels)
