"""The losses of an output layer as plain torch, from its logits: for autograd.

They are the losses that `bpfree_kernels.classifier_step` computes; its module has the table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.reference.classifier import LOSSES

__all__ = ["LOSSES", "batch_loss", "check_loss", "output_of"]


def check_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is one of `LOSSES`."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")


def batch_loss(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """Mean loss of a batch, 0-d and differentiable.

    Args:
        logits: [batch, classes].
        y: class of each sample, int32 or int64, [batch].
        loss: one of `LOSSES`.
    """
    if loss == "ce":
        return F.cross_entropy(logits, y.long())
    target = F.one_hot(y.long(), logits.shape[1]).to(logits.dtype)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.mse_loss(logits, target)


def output_of(logits: Tensor, loss: str) -> Tensor:
    """The output that belongs to a loss: softmax (``ce``), sigmoid (``bce``), logits (``mse``)."""
    if loss == "ce":
        return torch.softmax(logits, 1)
    return torch.sigmoid(logits) if loss == "bce" else logits
