"""URFB and FRFB: random feedback that is updated, or stays fixed (Amit, 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import feedback as random_feedback
from bpfree.losses import Loss, name_of, op_arguments
from bpfree.nn import LocallyConnected2d
from bpfree.nn.connectivity import clear_outside, masked
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules import _between
from bpfree.rules._dense import learn_dense
from bpfree.rules._feedback_buffers import FeedbackBuffers, Masks
from bpfree.rules._products import place_of, products
from bpfree.rules.base import Learner
from bpfree.stages import Layer, Stage


@dataclass(frozen=True, eq=False)
class _Passed:
    """What the forward pass keeps of a hidden stage.

    Attributes:
        stage: the stage.
        x: input of the layer, as its products take it.
        z: pre-activation (field).
        back: the way back through the modules behind the stage.
    """

    stage: Stage
    x: Tensor
    z: Tensor
    back: _between.WayBack


class URFB(Learner):
    """Updated random feedback: a signal comes down through weights R that learn what W learns.

    R_l has the shape of W_l and values of its own, which begin at random. With the gradient
    of the loss at the output's z as the first signal, in the gradient convention::

        δ_L = ∂loss/∂z_L,   δ_{l−1} = f′(z_{l−1}) ⊙ R_lᵀ δ_l
        ∂W_l = mean over the batch of δ_l · h_{l−1}ᵀ,   W_l ← W_l − lr·∂W_l,   R_l ← R_l − lr·∂W_l

    δ_{l−1} uses the R_l from before the update. A convolution's Rᵀ is the transposed convolution with
    R, a locally connected layer's the same with weights of each place; ∂W of a convolution sums over
    space. Between the layers the signal takes the way back through pooling and dropout that torch's
    autograd takes, with the choices of the forward pass. Biases learn by ∂b_l = mean of δ_l.

    `feedback` holds R_l by layer name, for every layer but the first, whose R would carry a signal to
    the input. With equal masks (or none) and no weight decay W_l − R_l stays what it was at the start;
    where that is 0, the rule is backpropagation. R's optimizer state is the learner's and in its
    `state_dict`. Under an optimizer that the kernels do not run, R receives the increment that the
    optimizer gives to W. `grads` leaves R alone.

    The paper's activation is `bpfree.nn.SaturatedLinear`, its loss the hinge.
    """

    rule = "urfb"
    layers = get_args(Layer)
    learns_feedback: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "hinge",
        connectivity: float = 1.0,
        seed: int = 0,
        feedback: Mapping[str, Tensor] | None = None,
        input_shape: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        """Make a learner; for the arguments not listed, see `Learner`.

        Args:
            connectivity: share of the connections of W_l, and independently of R_l, that exist in
                every layer but the output, in (0, 1]. The others are set to 0 now and never change.
                Below 1 it adds to the `mask` that a LocallyConnected2d may have of its W.
            seed: seed of R and of the connections.
            feedback: R_l by layer name, shaped like W_l, used instead of random ones. Layers left out
                get random ones, ±√(6/(k·k·(in + out))).
            input_shape: shape of one sample, e.g. ``(3, 32, 32)``; with it, everything is checked now
                instead of at the first batch.

        Raises:
            TypeError, ValueError, RuntimeError: as `Learner`; ValueError also for a connectivity out
                of range, feedback that does not fit, and a sample that the model cannot take.
        """
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        self.connectivity = connectivity
        self._buffers = FeedbackBuffers(self.network, connectivity, seed)
        self._products = {s.name: products(s, backend) for s in self.network.stages}
        self._waiting: dict[str, Tensor] = {}
        if feedback is not None:
            self.check_feedback(feedback)
            self.take_feedback(feedback)
        if input_shape is not None:
            self.network.trace(tuple(input_shape))
        self._make_feedback()
        if connectivity < 1:
            for stage in self.network.hidden:
                clear_outside(stage.layer.weight, self._buffers.masks(stage).weight)

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
        """Masks of the connections, and the optimizer's state of R, by kind and layer name."""
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
        scale = kernels.gradient_scale(name_of(self.loss), *result.error.shape)
        stage = output
        signal = result.error  # unscaled all the way down: small numbers lose digits in float16
        for below in reversed(passed):
            lower = self._carry_down(signal, stage, x, below)
            self._learn_layer(stage, x, signal, scale, updates)  # only now: δ takes the old R
            stage, x, signal = below.stage, below.x, lower
        self._learn_layer(stage, x, signal, scale, updates)
        return StepResult(result.loss.mean(), result.output)

    def _run_hidden(self, x: Tensor, updates: Updates) -> tuple[list[_Passed], Tensor]:
        """What is to be kept of the hidden stages from the first that learns, and the last's output."""
        passed: list[_Passed] = []
        for stage in self.network.hidden:
            if not passed and not updates.wants_any(stage.layer):
                x = stage.leave(stage.forward(x))
                continue
            layer = self._products[stage.name]
            x = layer.enter(x)
            z, h = layer.forward(x)
            left, back = _between.run(stage.after, h)
            passed.append(_Passed(stage, x, z, back))
            x = left
        return passed, x

    def _carry_down(self, signal: Tensor, stage: Stage, x: Tensor, below: _Passed) -> Tensor:
        """δ of the stage below, from that of a stage and its input."""
        feedback = self._feedback[stage.name]
        arrived = self._products[stage.name].feedback(signal, feedback, x)
        return below.stage.gate(below.back(arrived), below.z)

    def _learn_layer(
        self, stage: Stage, x: Tensor, signal: Tensor, scale: float, updates: Updates
    ) -> None:
        """Let W and b learn, and R in the same go; a frozen layer stays as it is."""
        layer = stage.layer
        if not updates.wants_any(layer):
            return
        masks = self._buffers.masks(stage)
        feedback = self._feedback.get(stage.name) if self.learns_feedback else None
        fused = updates.fused(layer.weight, layer.bias)
        if fused is not None and isinstance(layer, LocallyConnected2d):
            rule, state = fused
            learns = None if feedback is None else self._buffers.state(stage, feedback, rule)
            kernels.local_conv_step(
                signal, x, layer.weight, layer.bias, rule, state,
                feedback=feedback, feedback_state=learns,
                weight_mask=masks.weight,
                feedback_mask=None if feedback is None else masks.feedback,
                scale=scale, **place_of(layer), backend=self.backend,
            )  # fmt: skip
        elif feedback is None and masks.weight is None and isinstance(layer, nn.Linear):
            learn_dense(self, layer, signal, x, updates, scale=scale)
        else:
            of_weight, of_bias = self._products[stage.name].gradients(signal, x, scale)
            self._deliver_weight(stage, of_weight, feedback, masks, updates)
            if layer.bias is not None and of_bias is not None:
                updates.deliver(layer.bias, of_bias)

    def _deliver_weight(
        self, stage: Stage, grad: Tensor, feedback: Tensor | None, masks: Masks, updates: Updates
    ) -> None:
        """Hand over the gradient of W, to W and, in a step, to the R that learns."""
        weight = stage.layer.weight
        if feedback is not None and updates is self._updates and updates.wants(weight):
            alone = updates.fused(weight, None)
            if alone is None:
                # W's increment becomes R's in _after_step, also where only R has a connection.
                self._waiting[stage.name] = weight.detach().clone()
                updates.deliver(weight, grad)
                return
            state = self._buffers.state(stage, feedback, alone[0])
            of_feedback = masked(grad, masks.feedback)
            kernels.apply_update(feedback, of_feedback, alone[0], state, backend=self.backend)
        updates.deliver(weight, masked(grad, masks.weight))

    def _after_step(self, samples: int) -> None:  # noqa: ARG002
        for stage in self.network.stages[1:]:
            before = self._waiting.pop(stage.name, None)
            if before is None:
                continue
            weight, masks = stage.layer.weight, self._buffers.masks(stage)
            self._feedback[stage.name].add_(masked(weight - before, masks.feedback))
            clear_outside(weight, masks.weight)

    def _explain_stage(self, stage: Stage) -> str:
        learns = self.learns_feedback and stage.position > 0
        apart = ""
        if isinstance(stage.layer, nn.Conv2d):
            apart = "torch computes the gradient"
        elif isinstance(stage.layer, nn.Linear) and learns:
            apart = "one gradient for weight and feedback"
        elif isinstance(stage.layer, nn.Linear) and self._buffers.masks(stage).weight is not None:
            apart = "not every connection exists"
        text = self._explain_updates(stage, apart=apart)
        if stage.position == 0:
            return text
        return f"{text}; its feedback {'learns the same' if learns else 'stays as it is'}"


class FRFB(URFB):
    """Fixed random feedback, or feedback alignment: `URFB` whose R never changes."""

    rule = "frfb"
    learns_feedback = False
