"""What rules share whose signal comes down layer by layer through weights of its own.

From the output down, a layer's signal is carried to the layer below and the layer learns, its feedback weight
beside it. A rule states how a signal comes down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import feedback as random_feedback
from bpfree.losses import Loss
from bpfree.nn.connectivity import clear_outside, masked
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules._feedback_buffers import FeedbackBuffers
from bpfree.rules._layerwise import LayerwiseLearner, Passed
from bpfree.stages import Stage
from bpfree_kernels.update import UpdateRule


class FeedbackLearner(LayerwiseLearner):
    """A learner with feedback weights that lie like the forward weights, for every layer but the first.

    `feedback` holds them by layer name; the first layer's would carry a signal to the input. Their optimizer
    state is the learner's (`buffers`), and in its `state_dict`.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: Loss,
        seed: int,
        feedback: Mapping[str, Tensor] | None,
        input_shape: Sequence[int] | None,
        backend: str | None,
        connectivity: float = 1.0,
    ) -> None:
        """Make the feedback; arguments and errors as `bpfree.URFB` has them."""
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        self._buffers = FeedbackBuffers(self.network, connectivity, seed)
        self._waiting: dict[str, Tensor] = {}
        if feedback is not None:
            self.check_feedback(feedback)
            self.take_feedback(feedback)
        if input_shape is not None:
            self.network.trace(tuple(input_shape))
        self._make_feedback()

    # What a rule implements

    @property
    @abstractmethod
    def feedback_scale(self) -> float:
        """Factor of the feedback's gradient: that of the layer's weight times this; 0: it stays."""

    @abstractmethod
    def _scale(self, samples: int, classes: int) -> float:
        """Factor of every gradient, for a batch of a size."""

    @abstractmethod
    def _carry_down(self, signal: Tensor, stage: Stage, x: Tensor, below: Passed) -> Tensor:
        """Signal of the stage below, from that of a stage and its input; feedback as it is now."""

    # Feedback

    def _feedback_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {s.name: tuple(s.layer.weight.shape) for s in self.network.stages[1:]}

    def _prepare(self, sample: tuple[int, ...]) -> None:
        super()._prepare(sample)
        self._make_feedback()

    def _make_feedback(self) -> None:
        """Draw the feedback that is missing, and put everything where its layer is."""
        ready = {}
        for stage in self.network.stages[1:]:
            weight = stage.layer.weight
            feedback = self._feedback.get(stage.name)
            if feedback is None:
                feedback = random_feedback.draw_weights(
                    weight, seed=self.seed, position=stage.position
                )
            ready[stage.name] = feedback.to(weight.device, weight.dtype)
        self._feedback.update(ready)
        self._buffers.to_layers()
        for stage in self.network.stages[1:]:
            clear_outside(ready[stage.name], self._buffers.masks(stage).feedback)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The optimizer's state of the feedback, and masks if there are any, by kind and layer name."""
        return self._buffers.tensors()

    def check_buffers(self, given: Mapping[str, Tensor]) -> None:
        """As `Learner.check_buffers`."""
        self._buffers.check(given)

    def take_buffers(self, given: Mapping[str, Tensor]) -> None:
        """As `Learner.take_buffers`."""
        self._buffers.take(given)

    # Learning

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        self._waiting.clear()
        passed, x = self._run_hidden(self.network.enter(x), updates)
        result = self._run_output(x, y)
        scale = self._scale(*result.error.shape)
        stage = self.network.output
        signal = result.error  # unscaled all the way down: small numbers lose digits in float16
        while passed:
            below = passed.pop()  # nothing else keeps its maps once they have served
            # First down, then learn: the feedback of before the update carries the signal.
            lower = self._carry_down(signal, stage, x, below)
            self._learn_layer(stage, x, signal, scale, updates)
            stage, x, signal = below.stage, below.x, lower
        self._learn_layer(stage, x, signal, scale, updates)
        return StepResult(result.loss.mean(), result.output)

    def _step_arguments(self, stage: Stage, rule: UpdateRule) -> dict[str, Any]:
        feedback = self._learning_feedback(stage)
        if feedback is None:
            return {}
        state = self._buffers.state(stage, feedback, rule)
        return {"feedback": feedback, "feedback_state": state}

    def _learning_feedback(self, stage: Stage) -> Tensor | None:
        return self._feedback.get(stage.name) if self.feedback_scale != 0 else None

    def _deliver_weight(self, stage: Stage, grad: Tensor, updates: Updates) -> None:
        """Hand over the gradient of W, and in a step to the feedback that learns."""
        weight, masks = stage.layer.weight, self._buffers.masks(stage)
        feedback = self._learning_feedback(stage)
        if feedback is not None and updates is self._updates and updates.wants(weight):
            alone = updates.fused(weight, None)
            if alone is None:
                # W's increment becomes the feedback's in _after_step, also where only that has a connection.
                self._waiting[stage.name] = weight.detach().clone()
                updates.deliver(weight, grad, self.max_norm)
                return
            kernels.apply_update(
                feedback, masked(grad, masks.feedback), alone[0],
                self._buffers.state(stage, feedback, alone[0]),
                scale=self.feedback_scale, max_norm=self.max_norm, backend=self.backend,
            )  # fmt: skip
        updates.deliver(weight, masked(grad, masks.weight), self.max_norm)

    def _after_step(self, samples: int) -> None:  # noqa: ARG002
        for stage in self.network.stages[1:]:
            before = self._waiting.pop(stage.name, None)
            if before is None:
                continue
            weight, masks = stage.layer.weight, self._buffers.masks(stage)
            increment = masked(weight - before, masks.feedback)
            self._feedback[stage.name].add_(increment, alpha=self.feedback_scale)
            clear_outside(weight, masks.weight)

    # Explaining

    def _explain_stage(self, stage: Stage) -> str:
        text = super()._explain_stage(stage)
        return text if stage.position == 0 else f"{text}; {self._explain_feedback(stage)}"

    @abstractmethod
    def _explain_feedback(self, stage: Stage) -> str:
        """What becomes of a layer's feedback."""
