"""URFB and FRFB: random feedback that is updated, or stays fixed (Amit, 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.losses import Loss, name_of
from bpfree.nn import LocallyConnected2d
from bpfree.nn.connectivity import clear_outside
from bpfree.rules._feedback_learner import FeedbackLearner
from bpfree.rules._layerwise import Passed
from bpfree.stages import Layer, Stage
from bpfree_kernels.update import UpdateRule


class URFB(FeedbackLearner):
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
        super().__init__(
            model, optimizer, loss=loss, seed=seed, feedback=feedback, input_shape=input_shape,
            backend=backend, connectivity=connectivity,
        )  # fmt: skip
        self.connectivity = connectivity
        if connectivity < 1:
            for stage in self.network.hidden:
                clear_outside(stage.layer.weight, self._buffers.masks(stage).weight)

    @property
    def feedback_scale(self) -> float:
        """R's gradient is W's."""
        return 1.0

    def _scale(self, samples: int, classes: int) -> float:
        return kernels.gradient_scale(name_of(self.loss), samples, classes)

    def _carry_down(self, signal: Tensor, stage: Stage, x: Tensor, below: Passed) -> Tensor:
        feedback = self._feedback[stage.name]
        arrived = self._products[stage.name].feedback(signal, feedback, x)
        return below.stage.gate(below.back(arrived), below.z)

    def _why_apart(self, stage: Stage) -> str:
        local = isinstance(stage.layer, LocallyConnected2d)  # whose op takes masks
        return "" if local or not self._masked(stage) else "not every connection exists"

    def _masked(self, stage: Stage) -> bool:
        return any(mask is not None for mask in self._buffers.masks(stage))

    def _step_arguments(self, stage: Stage, rule: UpdateRule) -> dict[str, Any]:
        arguments = super()._step_arguments(stage, rule)
        if self._masked(stage):
            masks = self._buffers.masks(stage)
            arguments["weight_mask"] = masks.weight
            arguments["feedback_mask"] = masks.feedback if "feedback" in arguments else None
        return arguments

    def _explain_feedback(self, stage: Stage) -> str:  # noqa: ARG002
        return f"its feedback {'learns the same' if self.feedback_scale else 'stays as it is'}"


class FRFB(URFB):
    """Fixed random feedback, or feedback alignment: `URFB` whose R never changes."""

    rule = "frfb"

    @property
    def feedback_scale(self) -> float:
        """R has no gradient."""
        return 0.0
