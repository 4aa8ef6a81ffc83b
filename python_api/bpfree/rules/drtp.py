"""DRTP: direct random target projection (Frenkel, Lefebvre and Bol, 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import feedback as random_feedback
from bpfree.losses import Loss
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules._output import learn_output
from bpfree.rules._products import convolutions
from bpfree.rules.base import Learner
from bpfree.stages import Stage


class DRTP(Learner):
    """Hidden layers learn from a fixed random projection of the label, the last one from its loss.

    For a hidden layer f(z), z = W x + b, with feedback B and the class c of a sample (algorithm 1
    of the paper, in the gradient convention of the authors' code)::

        post = B[c] ⊙ f′(z),   ∂W = Σ_batch post · xᵀ,   ∂b = Σ_batch post

    A convolution's z is its map before pooling, and its gradients sum over space, too; x is what
    the layer really got, after dropout. No layer waits for another, so a step goes layer by layer
    and keeps nothing: the memory of activations does not grow with depth. The paper's activation is
    tanh, whose slope ends the growth of a unit's input; with ReLU nothing does.
    """

    rule = "drtp"

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "bce",
        seed: int = 0,
        feedback: Mapping[str, Tensor] | None = None,
        input_shape: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        """Make a learner; for the arguments not listed, see `Learner`.

        Args:
            seed: seed of the random feedback.
            feedback: feedback by layer name, used instead of random ones: [classes, out] for a
                Linear, [classes, O, H, W] for a Conv2d with an output map of O·H·W before pooling.
                Layers left out get a random one.
            input_shape: shape of one sample, e.g. ``(3, 32, 32)``; with it, everything is made and
                checked now, without it the feedback of convolutions is made at the first batch.

        Raises:
            TypeError, ValueError, RuntimeError: as `Learner`; ValueError also for feedback that
                does not fit, and for a sample that the model cannot take.
        """
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        self._convolutions = convolutions(self.network.hidden, backend)
        if feedback is not None:
            self.check_feedback(feedback)
            self.take_feedback(feedback)
        dense = [s for s in self.network.hidden if isinstance(s.layer, nn.Linear)]
        self._make_feedback({stage.name: (stage.layer.weight.shape[0],) for stage in dense})
        if input_shape is not None:
            self._prepare(tuple(input_shape))

    def _feedback_shapes(self) -> dict[str, tuple[int | None, ...]]:
        shapes: dict[str, tuple[int | None, ...]] = {}
        for stage in self.network.hidden:
            space = (None, None) if isinstance(stage.layer, nn.Conv2d) else ()
            shapes[stage.name] = (self.network.classes, stage.layer.weight.shape[0], *space)
        return shapes

    def _prepare(self, sample: tuple[int, ...]) -> None:
        self._make_feedback(self.network.trace(sample))

    def _make_feedback(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Draw the feedback that is missing, check the rest, and put it where its layer is."""
        ready = {}
        for stage in self.network.hidden:
            if stage.name not in shapes:
                continue
            units = shapes[stage.name]
            feedback = self.feedback.get(stage.name)
            if feedback is None:
                feedback = random_feedback.draw(
                    self.network.classes, units, seed=self.seed, position=stage.position
                )
            elif feedback.shape[1:] != units:
                raise ValueError(
                    f"layer {stage.name!r} has feedback for units of shape "
                    f"{tuple(feedback.shape[1:])}, but with this x its units are {units}."
                )
            weight = stage.layer.weight
            ready[stage.name] = feedback.to(weight.device, weight.dtype)
        self._feedback.update(ready)

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        x = self.network.enter(x)
        for stage in self.network.hidden:
            # Nothing else refers to the old x, so its memory is free before the next layer runs.
            x = stage.leave(self._learn_hidden(stage, x, y, updates))
        return learn_output(self, x, y, updates)

    def _learn_hidden(self, stage: Stage, x: Tensor, y: Tensor, updates: Updates) -> Tensor:
        """Output f(z) of a hidden layer, which learns on the way."""
        layer = stage.layer
        weight, bias = layer.weight, layer.bias
        if isinstance(layer, nn.Conv2d):
            return self._learn_convolution(stage, x, y, updates)
        fused = updates.fused(weight, bias)
        feedback = self.feedback[stage.name]
        if fused is not None:
            return kernels.drtp_linear_step(
                x, weight, bias, feedback, y, *fused,
                activation=stage.activation, slope=stage.slope, backend=self.backend,
            )  # fmt: skip
        if not updates.wants_any(layer):
            return stage.forward(x)
        output, of_weight, of_bias = kernels.drtp_linear_grad(
            x, weight, bias, feedback, y,
            activation=stage.activation, slope=stage.slope, backend=self.backend,
        )  # fmt: skip
        updates.deliver_layer(layer, of_weight, of_bias)
        return output

    def _learn_convolution(self, stage: Stage, x: Tensor, y: Tensor, updates: Updates) -> Tensor:
        layer, convolution = stage.layer, self._convolutions[stage.name]
        if not updates.wants_any(layer):
            return stage.forward(x)
        x = convolution.enter(x)
        output, signal = kernels.drtp_signal(
            convolution.field(x), self.feedback[stage.name], y,
            activation=stage.activation, slope=stage.slope, backend=self.backend,
        )  # fmt: skip
        fused = updates.fused(layer.weight, layer.bias)
        if fused is not None:
            convolution.step(signal, x, *fused, scale=1.0)
        else:
            updates.deliver_layer(layer, *convolution.gradients(signal, x, 1.0))
        return output
