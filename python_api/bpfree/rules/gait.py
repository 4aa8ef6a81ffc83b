"""GAIT-prop: targets through invertible layers, as errors that inverse weights carry (Ahmad et al., 2020)."""

from __future__ import annotations

import math
import warnings
from typing import cast, get_args

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.losses import Loss, name_of
from bpfree.nn import InvertibleConv2d, InvertibleLinear
from bpfree.nn.invertible import check_count
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules._between import WayBack
from bpfree.rules._inverses import Inverses
from bpfree.rules._layerwise import LayerwiseLearner, Passed
from bpfree.rules._targets import Nudge, target_signals
from bpfree.stages import Layer, Stage
from bpfree_kernels.ops.inverse import check_square

FORMS = ("difference", "literal")
"""How the errors may be computed."""


class GAITProp(LayerwiseLearner):
    """GAIT-prop: a target comes down through the inverse of every layer but the first.

    In exact arithmetic it is backpropagation with the inverse in the place of the transpose, for orthogonal
    weights backpropagation itself. In the gradient convention, with f the leaky ReLU or the identity::

        δ_L = ∂Loss/∂z_L,   δ_{l−1} = f′(z_{l−1}) ⊙ W_l⁻¹ δ_l,   Loss = sum over the batch
        ∂W_l = Σ_batch δ_l · h_{l−1}ᵀ + 4 λ (W_l W_lᵀ − I) W_l,   ∂b_l = Σ_batch δ_l

    Every layer but the first is a `bpfree.nn.InvertibleLinear`, a `bpfree.nn.InvertibleConv2d` (W taken as
    [out, in · kernel_h · kernel_w]) or a `torch.nn.Linear` with as many outputs as inputs; nothing but
    `torch.nn.Flatten` lies between them. Auxiliary outputs have no error. λ, the `orthogonal_penalty`, keeps
    weights orthogonal; the first layer has none.

    W is not inverted as long as it is nearly orthogonal: a series brings the errors down, whose residual is
    looked at before anything learns (once in a step, which waits for the device). A layer where it is too
    large is inverted from then on, beginning with that step; `explain` says which are. A step with a weight
    that has no inverse raises `torch.linalg.LinAlgError` with the layer's name and the condition number, and
    changes nothing.
    """

    rule = "gait"
    layers = get_args(Layer)

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "ce",
        num_classes: int | None = None,
        orthogonal_penalty: float = 0.0,
        off_diagonal: bool = False,
        form: str = "difference",
        normalised: bool = True,
        eta: float = 1e-7,
        rate: float = 1e-3,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        """Make a learner; for the arguments not listed, see `Learner`.

        Args:
            num_classes: how many outputs of the last layer are logits: from now on it hands on no others.
                ``None`` leaves it as it is.
            orthogonal_penalty: λ of the regulariser λ Σ (W Wᵀ − I)², which is added to the summed loss.
            off_diagonal: sum over the entries off the diagonal only, so that rows may have any length.
            form: ``"difference"``, the equations above, or ``"literal"``, targets as the paper has them: for
                float64, in float32 their differences drown.
            normalised: whether γ is η √d / ‖t − a‖ for each sample, or ``rate``. Only the literal form has
                a γ, in the difference form it cancels.
            eta: η, of the literal form.
            rate: γ of the literal form that is not normalised (vanilla).
            backend: ``"cpp"`` or ``"reference"`` instead of the device's default.

        Raises:
            TypeError, ValueError, RuntimeError: as `Learner`; ValueError also for an option out of range, a
                layer that has no inverse, and what between the layers has none.
        """
        _check_options(orthogonal_penalty, form, normalised, eta, rate, backend)
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        self._check_inverses()
        if num_classes is not None:
            _hand_on(self.network.output, num_classes)
        self.orthogonal_penalty = orthogonal_penalty
        self.off_diagonal = off_diagonal
        self.form = form
        self.nudge = Nudge(eta, rate, normalised)
        self._inverses = Inverses(backend)
        if form == "literal" and self.network.output.layer.weight.dtype != torch.float64:
            warnings.warn(
                "GAITProp in the literal form subtracts what is nearly equal: in float32 the errors of "
                "hidden layers are little but rounding; make the model float64.",
                stacklevel=2,
            )

    # Checks

    def _check_inverses(self) -> None:
        """Refuse, by name, what has no inverse."""
        for stage in self.network.stages[1:]:
            layer = stage.layer
            if isinstance(layer, InvertibleConv2d):
                continue
            if not isinstance(layer, nn.Linear) or layer.in_features != layer.out_features:
                raise ValueError(
                    "GAITProp needs an inverse of every layer but the first, a bpfree.nn."
                    "InvertibleLinear, InvertibleConv2d or a square Linear, but layer "
                    f"{stage.name!r} is {layer}."
                )
        for stage in self.network.hidden:
            if stage.activation not in kernels.INVERTIBLE_ACTIVATIONS:
                raise ValueError(
                    "GAITProp needs activations with an inverse, LeakyReLU or none, but behind layer "
                    f"{stage.name!r} is {stage.activation_module}."
                )
            for module in stage.after:
                if type(module) is not nn.Flatten:
                    raise ValueError(
                        "GAITProp takes nothing but Flatten between its layers, because a target has "
                        f"to come back, but behind layer {stage.name!r} is {module}, which has no inverse."
                    )

    def _prepare(self, sample: tuple[int, ...]) -> None:
        super()._prepare(sample)
        for stage in self.network.stages[1:]:
            check_square(f"weight of layer {stage.name!r}", stage.layer.weight)

    # Learning

    def loss_grads(self, x: Tensor, y: Tensor) -> StepResult:
        """As `grads`, without what the regulariser adds."""
        penalty, self.orthogonal_penalty = self.orthogonal_penalty, 0.0
        try:
            return self.grads(x, y)
        finally:
            self.orthogonal_penalty = penalty

    def _leave(self, stage: Stage, y: Tensor) -> tuple[Tensor, WayBack]:
        shape = y.shape  # flattening is all there is
        return stage.leave(y), lambda signal: signal.reshape(shape)

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        self._inverses.begin()
        passed, x = self._run_hidden(self.network.enter(x), updates)
        result = self._run_output(x, y)
        samples, classes = result.error.shape
        scale = samples * kernels.gradient_scale(name_of(self.loss), samples, classes)
        if self.form == "literal":
            output = (self.network.output, x)
            signals = target_signals(
                passed, output, scale * result.error, self.nudge, self._inverses, self.backend
            )
            scale = 1.0
        else:
            signals = self._errors(passed, x, result.error)
        for below, signal in zip(passed, signals[:-1], strict=True):
            self._learn_layer(below.stage, below.x, signal, scale, updates)
        self._learn_layer(self.network.output, x, signals[-1], scale, updates)
        return StepResult(result.loss.mean(), result.output)

    def _errors(self, passed: list[Passed], x: Tensor, error: Tensor) -> list[Tensor]:
        """δ at every z that is handed on, from the lowest stage that learns to the output; unscaled.

        Raises:
            torch.linalg.LinAlgError: a weight without an inverse.
        """
        signals = [error]  # from the output down
        layers = [(self.network.output, x), *((p.stage, p.x) for p in reversed(passed))]
        below = passed[::-1]
        while len(signals) < len(layers):
            residuals = {}
            for place in range(len(signals) - 1, len(below)):
                stage, entered = layers[place]
                lower, residual = self._inverses.carry_down(
                    signals[place], stage, entered, below[place]
                )
                signals.append(lower)
                if residual is not None:
                    residuals[stage] = residual
            far = self._inverses.leave_series(residuals)
            if far is not None:  # errors below this layer are void, and come down again
                del signals[[stage for stage, _ in layers].index(far) + 1 :]
        return signals[::-1]

    def _penalty(self, stage: Stage) -> float:
        return self.orthogonal_penalty if stage.position else 0.0

    def _why_apart(self, stage: Stage) -> str:
        return "the regulariser joins it" if self._penalty(stage) else ""

    def _deliver_weight(self, stage: Stage, grad: Tensor, updates: Updates) -> None:
        weight, penalty = stage.layer.weight, self._penalty(stage)
        if not (penalty and updates.wants(weight)):
            updates.deliver(weight, grad)
            return
        g = self._inverses.orthogonality(stage)
        alone = updates.fused(weight, None)
        if alone is not None:
            kernels.orthogonal_update(
                weight, grad, g, alone[0], alone[1].weight,
                penalty=penalty, off_diagonal=self.off_diagonal, backend=self.backend,
            )  # fmt: skip
            return
        if self.off_diagonal:
            g = g - torch.diag(g.diagonal())
        regular = (g @ weight.flatten(1)).view_as(weight)
        updates.deliver(weight, grad.add_(regular, alpha=4 * penalty))  # in grad's order in memory

    # Explaining

    def _explain_stage(self, stage: Stage) -> str:
        text = self._explain_updates(stage, apart=self._why_apart(stage), op="orthogonal_update")
        if stage.position == 0:
            return text
        if self.form == "literal":
            return f"{text}; targets go down by its inverse, refined at every step"
        way = (
            "a series in W Wᵀ − I"
            if self._inverses.takes_series(stage)
            else "its inverse, refined at every step (it is far from orthogonal)"
        )
        return f"{text}; errors go down by {way}"


def _hand_on(output: Stage, classes: int) -> None:
    """Let the output layer hand on its logits only.

    Raises:
        TypeError, ValueError: no number of its outputs.
    """
    layer = cast(nn.Linear, output.layer)
    if isinstance(layer, InvertibleLinear):
        layer.outputs = check_count("num_classes", classes, layer.out_features)
    elif layer.out_features != classes:
        raise ValueError(
            f"num_classes must be {layer.out_features}, the outputs of layer {output.name!r}, got "
            f"{classes!r}: a bpfree.nn.InvertibleLinear may have more outputs than classes."
        )


def _check_options(
    penalty: float, form: str, normalised: bool, eta: float, rate: float, backend: str | None
) -> None:
    if not 0 <= penalty < math.inf:
        raise ValueError(f"orthogonal_penalty must be finite and not negative, got {penalty}.")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    if not normalised and form != "literal":
        raise ValueError(
            "normalised (on the command line --vanilla) must be true unless form is 'literal': in the "
            "difference form γ cancels."
        )
    for name, number in (("eta", eta), ("rate", rate)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}.")
    if backend not in (None, "cpp", "reference"):
        raise ValueError(
            f"backend must be 'cpp' or 'reference' for GAITProp, got {backend!r}: on a GPU some of its "
            "ops are Triton's and some CUDA C++, as the device's default takes them."
        )
