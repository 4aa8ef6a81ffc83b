"""Backpropagation by torch's autograd: the baseline that the other rules are compared with."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from bpfree.losses import Loss, batch_loss, output_of
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules.base import Learner
from bpfree.stages import Layer, Stage


class BP(Learner):
    """Plain torch: autograd computes the gradients, the optimizer's own ``step()`` applies them."""

    rule = "bp"
    layers = get_args(Layer)
    uses_kernels = False

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "ce",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        """Make a learner; arguments and errors as in `Learner`.

        Raises:
            ValueError: also for any `backend`, because no op of this library runs.
        """
        if backend is not None:
            raise ValueError(
                f"backend has no meaning for BP, which is torch's own, got {backend!r}."
            )
        super().__init__(model, optimizer, loss=loss, seed=seed)

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        learning = [p for p in self.model.parameters() if updates.wants(p)]
        with torch.enable_grad():
            logits = self.model(x)
            loss = batch_loss(logits, y, self.loss)
        if learning:
            for parameter, grad in zip(learning, torch.autograd.grad(loss, learning), strict=True):
                updates.deliver(parameter, grad)
        return StepResult(loss.detach(), output_of(logits.detach(), self.loss))

    def _explain_stage(self, stage: Stage) -> str:
        return self._explain_updates(stage, apart="torch computes the gradient")
