"""DRTP as ordinary PyTorch writes it: autograd, with the gradient replaced at every hidden layer.

The formulation of the rule's authors: a product of the one-hot labels with the feedback takes the
place of the gradient at f(z), and autograd does the rest. It still computes every gradient towards
the layer below, which is then thrown away, and it keeps every activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.losses import Loss, batch_loss, check_loss, output_of
from bpfree.results import StepResult
from bpfree.stages import parse


class _ReplaceGradient(torch.autograd.Function):
    """Passes y on, and gives back the projected label instead of the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(target, feedback)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, None, None]:
        target, feedback = ctx.saved_tensors
        projected = target @ feedback.flatten(1)
        return projected.view(-1, *feedback.shape[1:]), None, None


class PlainDRTP:
    """The baseline of `bpfree.DRTP`: same model, same feedback, same result."""

    def __init__(
        self,
        model: nn.Sequential,
        feedback: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Loss = "bce",
    ) -> None:
        """Make a baseline.

        Args:
            model: as for `bpfree.DRTP`.
            feedback: feedback by the name of each hidden layer, like `feedback` of a DRTP learner.
            optimizer: any torch optimizer.
            loss: as for `bpfree.DRTP`.

        Raises:
            TypeError, ValueError: a model that is not supported, or an unknown loss.
            KeyError: feedback that lacks a hidden layer.
        """
        check_loss(loss)
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self._network = parse(model)
        self._feedback = [feedback[stage.name] for stage in self._network.hidden]

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward, backward, update.

        Args:
            x: input, [batch, ...].
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output, of the parameters before the update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        result = self.backward(x, y)
        self.optimizer.step()
        return result

    def backward(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward and ``loss.backward()`` only: adds to ``.grad``."""
        target = F.one_hot(y.long(), self._network.classes).to(x.dtype)
        h = self._network.enter(x)
        for stage, feedback in zip(self._network.hidden, self._feedback, strict=True):
            h = stage.forward(h)
            h = _ReplaceGradient.apply(h, target, feedback)  # type: ignore[no-untyped-call]
            h = stage.leave(h)
        logits = self._network.output.forward(h)
        loss = batch_loss(logits, y, self.loss)
        loss.backward()
        return StepResult(loss.detach(), output_of(logits.detach(), self.loss))
