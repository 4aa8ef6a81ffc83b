"""The losses of an output layer: how a learner takes them, and as plain torch, for autograd.

They are the losses that `bpfree_kernels.classifier_step` computes; its module has the table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.nn.loss import MultiClassHingeLoss
from bpfree_kernels import losses
from bpfree_kernels.losses import DEFAULT_MARGIN, LOSSES

__all__ = [
    "LOSSES",
    "Loss",
    "batch_loss",
    "check_loss",
    "describe",
    "name_of",
    "op_arguments",
    "output_of",
]

Loss = str | MultiClassHingeLoss
"""One of `LOSSES`, or for other options than the default ones of ``hinge`` its module."""


def check_loss(loss: Loss) -> None:
    """Raise ValueError unless `loss` is one of `LOSSES`, or a hinge loss that takes the mean."""
    if not isinstance(loss, MultiClassHingeLoss):
        losses.check_loss(loss)
    elif loss.reduction != "mean":
        raise ValueError(f"loss must have the reduction 'mean', got {loss}.")


def name_of(loss: Loss) -> str:
    """Which of `LOSSES` it is."""
    return loss if isinstance(loss, str) else "hinge"


def op_arguments(loss: Loss) -> dict[str, Any]:
    """The keyword arguments by which the classifier ops of `bpfree_kernels` take a loss."""
    if isinstance(loss, str):
        return {"loss": loss}
    return {"loss": "hinge", "margin": loss.margin, "off_class": loss.off_class}


def describe(loss: Loss) -> str:
    """The loss as text: alike for losses that are, and only for those."""
    if isinstance(loss, str):
        return loss
    if (loss.margin, loss.off_class) == (DEFAULT_MARGIN, None):
        return "hinge"
    return f"hinge(margin={loss.margin}, off_class={loss.off_class})"


def batch_loss(logits: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Mean loss of a batch, 0-d and differentiable.

    Args:
        logits: [batch, classes].
        y: class of each sample, int32 or int64, [batch].
        loss: one of `LOSSES`, or a hinge loss.
    """
    if name_of(loss) == "hinge":
        module = MultiClassHingeLoss() if isinstance(loss, str) else loss
        mean: Tensor = module(logits, y)
        return mean
    if loss == "ce":
        return F.cross_entropy(logits, y.long())
    target = F.one_hot(y.long(), logits.shape[1]).to(logits.dtype)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.mse_loss(logits, target)


def output_of(logits: Tensor, loss: Loss) -> Tensor:
    """The output that belongs to a loss: softmax (``ce``), sigmoid (``bce``) or the logits."""
    if loss == "ce":
        return torch.softmax(logits, 1)
    return torch.sigmoid(logits) if loss == "bce" else logits
