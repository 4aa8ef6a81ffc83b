"""PEPITA: present the error to perturb the input to modulate activity (Dellaferrera and Kreiman, 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import differences, seeds
from bpfree import feedback as random_feedback
from bpfree.losses import Loss, name_of, op_arguments
from bpfree.mirroring import WeightMirroring, draw_factors, draw_noise, mirror, projection
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules import _time_local
from bpfree.rules._dense import learn_dense
from bpfree.rules._output import learn_output
from bpfree.rules._passes import Kept, Modulation
from bpfree.rules._pepita_convolution import change_convolution
from bpfree.rules._products import convolutions
from bpfree.rules.base import Learner
from bpfree.stages import Stage

INPUT = "input"
"""Name of F among the learner's feedback."""

_CHOICES = {
    "presynaptic": ("modulated", "standard"),
    "output_error": ("first", "second"),
    "space": ("mean", "sqrt", "sum"),
}


class PEPITA(Learner):
    """Hidden layers learn from how they change when the output's error is added to the input.

    A first pass gives the activations h_l and the output's error e; a fixed random F projects e onto
    the input, and a second pass gives h′_l. In the gradient convention (the paper's equations 3-5)::

        h′_0 = h_0 + F e,   ∂W_l = mean of (h_l − h′_l) · h′_{l−1}ᵀ,   ∂b_l = mean of (h_l − h′_l)
        output layer: the gradient of its loss, but with h′_{L−1}: ∂W_L = mean of e · h′_{L−1}ᵀ

    h_l is taken behind the activation and a dropout that directly follows it, whose mask is the same in
    both passes; h_0 is what enters the first layer. A convolution's h_l is its map before pooling, and
    its gradient sums over the map's P positions and divides by P. Instead of h′ the difference
    Δh_l = h′_l − h_l runs through the network, which loses no digits and in the first layer costs a
    fraction of a pass: Δz_l = W_l Δh_{l−1}, Δh_l = f(z_l + Δz_l) − f(z_l). The first pass keeps z_l and
    h_l of every hidden layer until the second has passed. `model.eval` drops nothing.

    **Time-local** (``time_local=True``; PEPITA-TL of Srinivasan et al., 2024): two Hebbian halves, each
    an update of its own and made while its pass runs, so that no layer remembers the first pass::

        first pass:   W_l learns from ∂W_l = + mean of h_l · h_{l−1}ᵀ,     ∂b_l = + mean of h_l
        second pass:  W_l learns from ∂W_l = − mean of h′_l · h′_{l−1}ᵀ,   ∂b_l = − mean of h′_l

    where h′_l runs through the weights that the first half has changed. The output layer learns as above.

    **Weight mirroring** (``mirroring=WeightMirroring()``): F follows the forward weights. The paper that
    proposes both also decays the forward weights, W ← (1 − lr·weight_decay)·W − lr·∂W: that is the
    ``weight_decay`` of `torch.optim.SGD` or `torch.optim.AdamW`.
    """

    rule = "pepita"
    uses_slope = False

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "ce",
        feedback_scale: float = 0.05,
        presynaptic: str = "modulated",
        output_error: str = "first",
        space: str = "mean",
        time_local: bool = False,
        mirroring: WeightMirroring | None = None,
        seed: int = 0,
        feedback: Mapping[str, Tensor] | None = None,
        input_shape: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        """Make a learner; for the arguments not listed, see `Learner`.

        Args:
            feedback_scale: F ~ U(±feedback_scale·√(6/n)), n the number of values that enter the first
                layer.
            presynaptic: what a signal is multiplied with: ``"modulated"``, h′ of the second pass, or
                ``"standard"``, h of the first (the paper allows both).
            output_error: error that the output layer learns from: of the ``"first"`` pass (the paper's
                equation 5), or of the ``"second"`` (the authors' code).
            space: a convolution's gradient divides by the P positions of its map (``"mean"``), by √P
                (``"sqrt"``), or not at all (``"sum"``).
            time_local: the time-local variant; dense nets and kernel-run optimizers only.
            mirroring: let F follow the weights; dense nets only.
            seed: seed of F and of the mirroring's noise.
            feedback: ``{"input": F}``, F of shape [n, classes], used instead of a random one; with
                `mirroring` instead B_l by layer name, [in, out].
            input_shape: shape of one sample, e.g. ``(3, 32, 32)``; with it, everything is made and
                checked now, without it the F of a convolutional net is made at the first batch.

        Raises:
            TypeError, ValueError, RuntimeError: as `Learner`; TypeError also for a `mirroring` of
                another type; ValueError for an option out of range or without meaning here, for
                feedback that does not fit, and for a sample that the model cannot take.
        """
        super().__init__(model, optimizer, loss=loss, seed=seed, backend=backend)
        _check_options(
            feedback_scale,
            mirroring,
            {"presynaptic": presynaptic, "output_error": output_error, "space": space},
        )
        self.feedback_scale = feedback_scale
        self.presynaptic = presynaptic
        self.output_error = output_error
        self.space = space
        self.time_local = time_local
        self.mirroring = mirroring
        self.convolutions = convolutions(self.network.hidden, backend)
        if time_local:
            _time_local.check(self, self._updates)
        if mirroring is not None:
            self._start_mirroring(feedback)
        if feedback is not None:
            self.check_feedback(feedback)
            self.take_feedback(feedback)
        features = self._features()
        if features is not None:
            self._make_feedback(features)
        if input_shape is not None:
            self._prepare(tuple(input_shape))

    # Feedback

    def take_feedback(self, given: Mapping[str, Tensor]) -> None:
        """Replace the learner's feedback by checked feedback; what is left out is made anew."""
        super().take_feedback(given)
        if INPUT in self._feedback:
            self._feedback[INPUT] = _laid_out(self._feedback[INPUT])

    def _features(self) -> int | None:
        """How many values enter the first layer, ``None`` where the size of the image decides."""
        first = self.network.stages[0].layer
        return first.in_features if isinstance(first, nn.Linear) else None

    def _feedback_shapes(self) -> dict[str, tuple[int | None, ...]]:
        shapes: dict[str, tuple[int | None, ...]] = {
            INPUT: (self._features(), self.network.classes)
        }
        if self.mirroring is not None:
            for stage in self.network.stages:
                out, features = stage.layer.weight.shape
                shapes[stage.name] = (features, out)
        return shapes

    def _prepare(self, sample: tuple[int, ...]) -> None:
        super()._prepare(sample)
        self._make_feedback(math.prod(self.network.entering(sample)))

    def _make_feedback(self, features: int) -> None:
        """Draw the feedback that is missing, check the rest, and put it where the model is."""
        given = self._feedback.get(INPUT)
        if given is not None and given.shape[0] != features:
            raise ValueError(
                f"feedback of {INPUT!r} is for {given.shape[0]} values, but with this x "
                f"{features} enter layer {self.network.stages[0].name!r}."
            )
        weight = self.network.output.layer.weight
        ready = {n: f.to(weight.device, weight.dtype) for n, f in self._feedback.items()}
        if self.mirroring is not None:
            self._complete_factors(ready, features)
        elif given is None:
            drawn = random_feedback.draw_input(
                features, self.network.classes, scale=self.feedback_scale, seed=self.seed
            )
            ready[INPUT] = drawn.to(weight.device, weight.dtype)
        self._feedback.update({**ready, INPUT: _laid_out(ready[INPUT])})

    # Weight mirroring

    def _start_mirroring(self, feedback: Mapping[str, Tensor] | None) -> None:
        names = [stage.name for stage in self.network.stages]
        for stage in self.network.stages:
            if isinstance(stage.layer, nn.Conv2d):
                raise ValueError(
                    f"mirroring needs a dense net, but layer {stage.name!r} is a convolution."
                )
        if INPUT in names:
            raise ValueError(f"mirroring needs the name {INPUT!r} for F, but a layer has it.")
        if feedback is not None and INPUT in feedback:
            raise ValueError(
                f"feedback of {INPUT!r} has no meaning with mirroring, which makes it the product of "
                f"the feedback of layers {', '.join(map(repr, names))}: give those."
            )
        self.generators["mirroring"] = seeds.generator("mirroring", self.seed, 0)

    def _complete_factors(self, ready: dict[str, Tensor], features: int) -> None:
        """Draw every B_l that is missing, and F as their product unless all were there."""
        stages = self.network.stages
        sizes = [features, *(stage.layer.weight.shape[0] for stage in stages)]
        drawn = draw_factors(sizes, std=self._feedback_rms(features), seed=self.seed)
        complete = INPUT in ready
        for stage, factor in zip(stages, drawn, strict=True):
            if stage.name not in ready:
                ready[stage.name] = factor.to(stage.layer.weight.device, stage.layer.weight.dtype)
                complete = False
        if not complete:
            factors = {stage.name: ready[stage.name] for stage in stages}
            ready[INPUT] = projection(factors, self._feedback_rms(features))

    def _feedback_rms(self, features: int) -> float:
        """Root mean square of an ordinary F: that of U(±feedback_scale·√(6/n))."""
        return self.feedback_scale * math.sqrt(2 / features)

    def _after_step(self, samples: int) -> None:
        if self.mirroring is None:
            return
        factors = {}
        for stage in self.network.stages:
            weight, bias = stage.layer.weight, stage.layer.bias
            noise = draw_noise(self.mirroring, samples, weight, self.generators["mirroring"])
            answer = kernels.dense_forward(
                noise, weight, bias,
                activation=stage.activation, slope=stage.slope, backend=self.backend,
            ).output  # fmt: skip
            factors[stage.name] = self._feedback[stage.name]
            mirror(self.mirroring, factors[stage.name], noise, answer)
        feedback = self._feedback[INPUT]
        feedback.copy_(projection(factors, self._feedback_rms(feedback.shape[0])))

    # Learning

    def grads(self, x: Tensor, y: Tensor) -> StepResult:
        """As `Learner.grads`.

        Raises:
            RuntimeError: also for a time-local learner, which has no gradients of fixed weights.
        """
        if self.time_local:
            raise RuntimeError(
                "grads has no meaning with time_local, whose second pass runs through weights that "
                "the first has changed: use step."
            )
        return super().grads(x, y)

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        x = self.network.enter(x)
        if self.time_local:
            _time_local.check(self, self._updates)  # its hyper-parameters may have changed
            return _time_local.learn(self, x, y, self._feedback[INPUT], updates)
        h, kept = self._first_pass(x)
        layer = self.network.output.layer
        first = kernels.classifier_forward(
            h, layer.weight, layer.bias, y, backend=self.backend, **op_arguments(self.loss)
        )
        by = Modulation(first.error, self._feedback[INPUT])
        for passed in kept:
            by = Modulation(self._second_pass(passed, by, updates), None)
        self._learn_output(h, by, first.error, y, updates)
        return StepResult(first.loss.mean(), first.output)

    def _explain_stage(self, stage: Stage) -> str:
        shared = isinstance(stage.layer, nn.Conv2d)
        return self._explain_updates(
            stage, apart="a convolution's is a sum of two" if shared else ""
        )

    def _first_pass(self, x: Tensor) -> tuple[Tensor, list[Kept]]:
        """Input of the output layer, and what the second pass needs of every hidden stage."""
        kept = []
        for stage in self.network.hidden:
            layer = stage.layer
            if isinstance(layer, nn.Conv2d):
                convolution = self.convolutions[stage.name]
                x = convolution.enter(x)
                z, h = convolution.forward(x)
            else:
                z, h = kernels.dense_forward(
                    x, layer.weight, layer.bias,
                    activation=stage.activation, slope=stage.slope, backend=self.backend,
                )  # fmt: skip
            mask, rest = differences.leading_dropout(stage.after, h)
            if mask is not None:
                h = h * mask if h is z else h.mul_(mask)
            h, ways = differences.run(rest, h, self.backend)
            kept.append(Kept(stage, x, z, mask, ways))
            x = h
        return x, kept

    def _second_pass(self, kept: Kept, by: Modulation, updates: Updates) -> Tensor:
        """Change of what leaves a hidden stage, which learns on the way."""
        if isinstance(kept.stage.layer, nn.Conv2d):
            changed = change_convolution(self, kept, by, updates)
        else:
            changed = self._change_dense(kept, by, updates)
        return differences.pass_on(kept.ways, changed)

    def _change_dense(self, kept: Kept, by: Modulation, updates: Updates) -> Tensor:
        stage, layer = kept.stage, kept.stage.layer
        weight, bias = layer.weight, layer.bias
        fused = updates.fused(weight, bias)
        if fused is None and not updates.wants_any(layer):
            changed = kernels.pepita_difference(
                kept.z, by.through(weight),
                activation=stage.activation, slope=stage.slope, backend=self.backend,
            )  # fmt: skip
            return changed if kept.mask is None else changed * kept.mask
        pre = by.of(kept.x) if self.presynaptic == "modulated" else kept.x
        if fused is not None:
            return kernels.pepita_linear_step(
                kept.z, pre, by.change, weight, bias, *fused, feedback=by.feedback, mask=kept.mask,
                activation=stage.activation, slope=stage.slope, backend=self.backend,
            )  # fmt: skip
        changed, *grads = kernels.pepita_linear_grad(
            kept.z, pre, by.change, weight, bias, feedback=by.feedback, mask=kept.mask,
            activation=stage.activation, slope=stage.slope, backend=self.backend,
        )  # fmt: skip
        updates.deliver_layer(layer, *grads)
        return changed

    def _learn_output(
        self, h: Tensor, by: Modulation, error: Tensor, y: Tensor, updates: Updates
    ) -> None:
        layer = self.network.output.layer
        if not updates.wants_any(layer):
            return
        modulated = self.presynaptic == "modulated"
        if self.output_error == "second":
            if modulated:
                learn_output(self, by.of(h), y, updates)
                return
            error = kernels.classifier_forward(
                by.of(h), layer.weight, layer.bias, y,
                backend=self.backend, **op_arguments(self.loss),
            ).error  # fmt: skip
        scale = kernels.gradient_scale(name_of(self.loss), *error.shape)
        pre = by.of(h) if modulated else h
        learn_dense(self, layer, error, pre, updates, scale=scale)


def _laid_out(feedback: Tensor) -> Tensor:
    """F as the transpose of a contiguous [classes, values]: the ops are fastest then."""
    return feedback.t().contiguous().t()


def _check_options(
    feedback_scale: float, mirroring: WeightMirroring | None, chosen: Mapping[str, str]
) -> None:
    if not 0 < feedback_scale < math.inf:
        raise ValueError(f"feedback_scale must be positive and finite, got {feedback_scale}.")
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}.")
    if mirroring is not None and not isinstance(mirroring, WeightMirroring):
        raise TypeError(
            f"mirroring must be a bpfree.WeightMirroring or None, got {type(mirroring).__name__}."
        )
