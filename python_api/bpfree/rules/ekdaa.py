"""EKDAA: error kernels drive activation alignment (Zee et al., 2023); of dense layers alone, LRA-E."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.losses import Loss
from bpfree.rules import _between
from bpfree.rules._feedback_learner import FeedbackLearner
from bpfree.rules._layerwise import Passed
from bpfree.rules._products import place_of
from bpfree.stages import Stage
from bpfree_kernels.update import UpdateRule

REDUCTIONS = ("sum", "mean")
"""What may become of the gradients of a batch's samples."""


@dataclass(frozen=True)
class _WayDown:
    """How an error comes from a layer to the stage below.

    Attributes:
        op: name of the op that ends with the error of the units below.
        pooling: the max pooling directly behind the activation, which the op goes back through.
        pool: the same as the op takes it.
        between: modules behind the pooling; the error goes back through them before the op.
    """

    op: str
    pooling: nn.MaxPool2d | None
    pool: kernels.MaxPool | None
    between: tuple[nn.Module, ...]


class EKDAA(FeedbackLearner):
    """Error kernels: an error comes down through E and moves the units below towards a target.

    E_l has the shape of W_l and values of its own, which begin at random. With the error of the output
    (softmax − target for the default loss) as the first one, in the gradient convention::

        e_L = ŷ − t,   d = E_lᵀ e_l,   y_{l−1} = f(z_{l−1} − β d),   e_{l−1} = f(z_{l−1}) − y_{l−1}
        ∂W_l = Σ_batch e_l · h_{l−1}ᵀ,   W_l ← W_l − lr·∂W_l,   E_l ← E_l − lr·γ·∂W_l

    d uses the E_l from before the update. A convolution's Eᵀ is the transposed convolution with E, its ∂W
    sums over space. f has no derivative here, and may be `bpfree.nn.Signum`. Biases learn by
    ∂b_l = Σ_batch e_l. Between the layers d takes the way back through dropout, average pooling and
    flattening that torch's autograd takes; through a max pooling directly behind an activation it goes as
    `upsample` says.

    `feedback` holds E_l by layer name, for every layer but the first, whose E would carry an error to the
    input. E's optimizer state is the learner's and in its `state_dict`. Under an optimizer that the kernels
    do not run, E receives γ times the increment that the optimizer gives to W. `grads` leaves E alone.

    A model of dense layers learns by LRA-E (Ororbia and Mali, 2019).
    """

    rule = "ekdaa"
    uses_slope = False

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "ce",
        beta: float = 0.9,
        gamma: float = 0.1,
        upsample: str = "argmax",
        reduction: str = "sum",
        max_norm: float | None = None,
        seed: int = 0,
        feedback: Mapping[str, Tensor] | None = None,
        input_shape: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        """Make a learner; for the arguments not listed, see `Learner`.

        Args:
            beta: how far an error moves the target.
            gamma: factor of E's gradient; 0 keeps E as it is. The paper prints the opposite sign, with
                which the hidden layers unlearn.
            upsample: how d comes back through a max pooling: ``"argmax"``, to the largest unit of each
                window, ``"nearest"``, to every unit, ``"average"``, to every unit in equal parts, or
                ``"bilinear"``.
            reduction: ``"sum"`` or ``"mean"`` over the batch, in every layer.
            max_norm: length (of all values, as a vector) to which each longer gradient is cut, of W, b
                and E each by itself; ``None`` for no limit.
            seed: seed of E.
            feedback: E_l by layer name, shaped like W_l, used instead of random ones. Layers left out
                get random ones, ±√(6/(k·k·(in + out))).
            input_shape: shape of one sample, e.g. ``(1, 28, 28)``; with it, everything is checked now
                instead of at the first batch.

        Raises:
            TypeError, ValueError, RuntimeError: as `Learner`; ValueError also for an option out of range,
                feedback that does not fit, a sample that the model cannot take, and for another
                `upsample` than ``"argmax"`` with a max pooling that does not directly follow an activation.
        """
        _check_options(beta, gamma, upsample, reduction, max_norm, backend)
        super().__init__(
            model, optimizer, loss=loss, seed=seed, feedback=feedback, input_shape=input_shape,
            backend=backend,
        )  # fmt: skip
        self.beta = beta
        self.gamma = gamma
        self.upsample = upsample
        self.reduction = reduction
        self.max_norm = max_norm
        self._ways = {
            below.name: self._way_down(above, below)
            for below, above in pairwise(self.network.stages)
        }

    @property
    def feedback_scale(self) -> float:
        """E's gradient is γ times W's."""
        return self.gamma

    def _way_down(self, above: Stage, below: Stage) -> _WayDown:
        """See `_WayDown`.

        Raises:
            ValueError: a max pooling through which `upsample` cannot go.
        """
        pooling, between = None, below.after
        if between and isinstance(between[0], nn.MaxPool2d):
            pooling, between = between[0], between[1:]
        if self.upsample != "argmax":
            for module in between:
                if isinstance(module, nn.MaxPool2d):
                    name = next(n for n, m in self.model.named_modules() if m is module)
                    raise ValueError(
                        f"upsample {self.upsample!r} needs every max pooling directly behind an "
                        f"activation, but module {name!r} ({module}) is not."
                    )
        if between:
            op = "ekdaa_error"
        else:
            op = "ekdaa_conv_error" if isinstance(above.layer, nn.Conv2d) else "ekdaa_linear_error"
        return _WayDown(op, pooling, None if pooling is None else _as_pool(pooling), between)

    def _scale(self, samples: int, classes: int) -> float:  # noqa: ARG002
        return 1.0 if self.reduction == "sum" else 1 / samples

    def _leave(self, stage: Stage, y: Tensor) -> tuple[Tensor, _between.WayBack]:
        way = self._ways[stage.name]
        return _between.run(way.between, y if way.pooling is None else way.pooling(y))

    def _carry_down(self, signal: Tensor, stage: Stage, x: Tensor, below: Passed) -> Tensor:
        feedback, way = self._feedback[stage.name], self._ways[below.stage.name]
        target: dict[str, Any] = {
            "beta": self.beta,
            "activation": below.stage.activation,
            "slope": below.stage.slope,
            "backend": self.backend,
        }
        if way.op == "ekdaa_linear_error":
            return kernels.ekdaa_linear_error(signal, feedback, below.z, **target)
        target |= {"pool": way.pool, "upsample": self.upsample}
        if way.op == "ekdaa_conv_error":
            place = place_of(stage.layer)
            return kernels.ekdaa_conv_error(signal, feedback, below.z, **place, **target)
        change = below.back(self._products[stage.name].feedback(signal, feedback, x))
        return kernels.ekdaa_error(change, below.z, **target)

    def _why_apart(self, stage: Stage) -> str:  # noqa: ARG002
        return "" if self.max_norm is None else "its length has to be known first"

    def _step_arguments(self, stage: Stage, rule: UpdateRule) -> dict[str, Any]:
        return super()._step_arguments(stage, rule) | {"feedback_scale": self.gamma}

    def _explain_feedback(self, stage: Stage) -> str:
        below = self.network.stages[stage.position - 1]
        learns = f"learns {self.gamma:g} times the same" if self.gamma else "stays as it is"
        return f"its error kernel {learns}, errors go down by {self._ways[below.name].op}"


def _as_pool(pooling: nn.MaxPool2d) -> kernels.MaxPool:
    return kernels.MaxPool(
        pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation, pooling.ceil_mode
    )


def _check_options(
    beta: float,
    gamma: float,
    upsample: str,
    reduction: str,
    max_norm: float | None,
    backend: str | None,
) -> None:
    for name, number in (("beta", beta), ("gamma", gamma)):
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}.")
    for name, word, known in (
        ("upsample", upsample, kernels.UPSAMPLINGS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if word not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {word!r}.")
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be positive and finite, got {max_norm}.")
    if upsample == "bilinear" and backend not in (None, "reference"):
        raise ValueError(f"backend must be 'reference' for upsample 'bilinear', got {backend!r}.")
