"""What rules share whose signal comes down layer by layer through weights of its own.

Forward keeps each layer's input and pre-activation. Then, from the output down, a layer's signal is carried
to the layer below and the layer learns, its feedback weight beside it. A rule states how a signal comes down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import feedback as random_feedback
from bpfree.losses import Loss, op_arguments
from bpfree.nn.connectivity import clear_outside, masked
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules._between import WayBack
from bpfree.rules._feedback_buffers import FeedbackBuffers
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
    back: WayBack


class FeedbackLearner(Learner):
    """A learner with feedback weights that lie like the forward weights, for every layer but the first.

    `feedback` holds them by layer name; the first layer's would carry a signal to the input. Their optimizer
    state is the learner's (`buffers`), and in its `state_dict`.
    """

    max_norm: float | None = None
    """Length to which each gradient is cut, ``None`` for any."""

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
        self._products = {s.name: products(s, backend) for s in self.network.stages}
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
    def _leave(self, stage: Stage, y: Tensor) -> tuple[Tensor, WayBack]:
        """Run what lies behind a stage's output; also the way back that `_carry_down` takes."""

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
        output = self.network.output
        result = kernels.classifier_forward(
            x, output.layer.weight, output.layer.bias, y,
            backend=self.backend, **op_arguments(self.loss),
        )  # fmt: skip
        scale = self._scale(*result.error.shape)
        stage = output
        signal = result.error  # unscaled all the way down: small numbers lose digits in float16
        while passed:
            below = passed.pop()  # nothing else keeps its maps once they have served
            # First down, then learn: the feedback of before the update carries the signal.
            lower = self._carry_down(signal, stage, x, below)
            self._learn_layer(stage, x, signal, scale, updates)
            stage, x, signal = below.stage, below.x, lower
        self._learn_layer(stage, x, signal, scale, updates)
        return StepResult(result.loss.mean(), result.output)

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

    def _learn_layer(
        self, stage: Stage, x: Tensor, signal: Tensor, scale: float, updates: Updates
    ) -> None:
        """Let W and b learn, and the feedback in the same go; a frozen layer stays as it is."""
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

    def _step_arguments(self, stage: Stage, rule: UpdateRule) -> dict[str, Any]:
        """What the layer's step takes for the feedback that learns beside it."""
        feedback = self._learning_feedback(stage)
        if feedback is None:
            return {}
        state = self._buffers.state(stage, feedback, rule)
        return {"feedback": feedback, "feedback_state": state}

    def _learning_feedback(self, stage: Stage) -> Tensor | None:
        return self._feedback.get(stage.name) if self.feedback_scale != 0 else None

    def _deliver_weight(self, stage: Stage, grad: Tensor, updates: Updates) -> None:
        """Hand over the gradient of W, to W and, in a step, to the feedback that learns."""
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
        text = self._explain_updates(stage, apart=self._why_apart(stage))
        return text if stage.position == 0 else f"{text}; {self._explain_feedback(stage)}"

    @abstractmethod
    def _explain_feedback(self, stage: Stage) -> str:
        """What becomes of a layer's feedback."""
