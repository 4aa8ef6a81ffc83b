"""What rules share whose signal comes down layer by layer, by whatever way.

Forward keeps each layer's input and pre-activation; then, with a signal at its output, each layer learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.losses import Loss, op_arguments
from bpfree.optimizers import Updates
from bpfree.rules import _between
from bpfree.rules._products import products
from bpfree.rules.base import Learner
from bpfree.stages import Stage
from bpfree_kernels.update import UpdateRule


@dataclass(frozen=True, eq=False)
class Passed:
    """What the forward pass keeps of a hidden stage.

    Attributes:
        stage: the stage.
        x: input of the layer, as its products take it.
        z: pre-activation.
        back: a way back from the next layer, as far as the rule does not go it itself.
    """

    stage: Stage
    x: Tensor
    z: Tensor
    back: _between.WayBack


class LayerwiseLearner(Learner):
    """A learner that runs forward once, and then has a signal at every z from which the layer learns."""

    max_norm: float | None = None
    """Length to which each gradient is cut, ``None`` for any."""

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: Loss,
        seed: int,
        backend: str | None,
    ) -> None:
        """As `Learner`."""
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        self._products = {s.name: products(s, backend) for s in self.network.stages}

    # Forward

    def _leave(self, stage: Stage, y: Tensor) -> tuple[Tensor, _between.WayBack]:
        """Run what lies behind a stage's output; also the way back from there."""
        return _between.run(stage.after, y)

    def _run_hidden(self, x: Tensor, updates: Updates) -> tuple[list[Passed], Tensor]:
        """What is to be kept of the hidden stages from the first that learns, and the last's output."""
        passed: list[Passed] = []
        for stage in self.network.hidden:
            if not passed and not updates.wants_any(stage.layer):
                x = stage.leave(stage.forward(x))
                continue
            layer = self._products[stage.name]
            x = layer.enter(x)
            z, h = layer.forward(x)
            left, back = self._leave(stage, h)
            passed.append(Passed(stage, x, z, back))
            x = left
        return passed, x

    def _run_output(self, x: Tensor, y: Tensor) -> kernels.ClassifierOutput:
        """Output, error and loss of the output layer."""
        return kernels.classifier_forward(
            x, *self.network.output.first(), y, backend=self.backend, **op_arguments(self.loss)
        )

    # Learning

    def _learn_layer(
        self, stage: Stage, x: Tensor, signal: Tensor, scale: float, updates: Updates
    ) -> None:
        """Let W and b learn, and what learns beside them in the same go; a frozen layer stays as it is."""
        layer, parts = stage.layer, self._products[stage.name]
        if not updates.wants_any(layer):
            return
        fused = None if self._why_apart(stage) else updates.fused(layer.weight, layer.bias)
        if fused is not None:
            arguments = self._step_arguments(stage, fused[0])
            parts.step(signal, x, *fused, scale=scale, **arguments)
            return
        of_weight, of_bias = parts.gradients(signal, x, scale)
        self._deliver_weight(stage, of_weight, updates)
        if layer.bias is not None and of_bias is not None:
            updates.deliver(layer.bias, of_bias, self.max_norm)

    def _why_apart(self, stage: Stage) -> str:  # noqa: ARG002
        """Why no op computes a layer's gradients and applies them in one; empty if one does."""
        return ""

    def _step_arguments(self, stage: Stage, rule: UpdateRule) -> Mapping[str, Any]:  # noqa: ARG002
        """What the layer's step takes for that which learns beside it."""
        return {}

    def _deliver_weight(self, stage: Stage, grad: Tensor, updates: Updates) -> None:
        """Hand over the gradient of W, and to that which learns beside it."""
        updates.deliver(stage.layer.weight, grad, self.max_norm)

    def _explain_stage(self, stage: Stage) -> str:
        return self._explain_updates(stage, apart=self._why_apart(stage))
