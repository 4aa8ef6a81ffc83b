"""What every learning rule shares: a `Learner` does everything but learn a batch.

A new rule is one file: a subclass that sets `Learner.rule` and implements `Learner._learn`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import state, training
from bpfree.losses import Loss, check_loss, describe
from bpfree.optimizers import GradientStore, OptimizerBridge, Updates
from bpfree.results import BatchInfo, EpochResult, EvalResult, StepResult
from bpfree.stages import Stage, parse
from bpfree_kernels import backends, checks


class Learner(ABC):
    """Trains a `torch.nn.Sequential` by one rule; subclasses are the rules.

    The model ends in its last `torch.nn.Linear`, whose output are the logits; `loss` names the
    activation and error that follow. It stays an ordinary module: its parameters are updated in
    place, and using it later needs nothing of this package.

    Layers whose parameters require no gradient, or are not in the optimizer, are frozen: they only
    run. The learner follows the model's ``train()`` and ``eval()`` (dropout), its device and its
    dtype. Forward hooks of layers and activations run in `evaluate`, but not while a layer learns.

    Attributes:
        rule: name of the rule.
        uses_kernels: whether the kernels may run the optimizer.
        layers: the kinds of layer that the rule can train.
        uses_slope: whether the rule needs f′ of the hidden activations.
        model: the model.
        network: the model as stages, read once: do not add or replace modules afterwards.
        loss: name of the loss, or a hinge loss.
        seed: seed of the rule's own random numbers.
        backend: backend of the ops; ``None`` is the device's default.
        feedback: feedback by layer name, there once it is made; empty for rules without.
        generators: random generators that learning draws from, by name; their state is part of the
            learner's.
    """

    rule: ClassVar[str]
    uses_kernels: ClassVar[bool] = True
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    uses_slope: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss = "bce",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        """Take the model apart and check everything that can be checked without data.

        Args:
            model: supported modules in a row (`bpfree.stages.SUPPORTED`), ending in a Linear.
            optimizer: any `torch.optim` object over parameters of the model. SGD, Adam and AdamW
                run inside the kernels, on its state and with its hyper-parameters; `explain` says
                where. Without one, only `grads` and `evaluate` work.
            loss: ``"bce"``, ``"ce"``, ``"mse"`` or ``"hinge"``; a `bpfree.nn.MultiClassHingeLoss` is
                ``"hinge"`` with other options.
            seed: seed of the rule's own random numbers; rules without any accept it all the same,
                so that every rule is made alike.
            backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

        Raises:
            TypeError: a module or an optimizer that is not supported.
            ValueError: an unknown loss or backend, a hinge loss of another reduction than the mean,
                a model that cannot learn, or an optimizer with parameters of another model.
            RuntimeError: a backend that cannot run here.
        """
        check_loss(loss)
        if backend == "cuda":  # which has a few ops only
            raise ValueError(
                "backend of a learner must be 'cpp', 'triton' or 'reference', got 'cuda'; the ops that have "
                "a CUDA body run it on a GPU without being told."
            )
        if backend is not None and not backends.status(backend).usable:
            raise RuntimeError(
                f"backend {backend!r} is not usable: {backends.status(backend).reason}."
            )
        self.model = model
        self.network = parse(model)
        self._check_layers()
        self.loss = loss
        self.seed = seed
        self.backend = backend
        self.generators: dict[str, torch.Generator] = {}
        self._feedback: dict[str, Tensor] = {}
        self._updates = (
            None
            if optimizer is None
            else OptimizerBridge(optimizer, model, in_kernel=self.uses_kernels, backend=backend)
        )
        self._last_input: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer, or ``None``."""
        return None if self._updates is None else self._updates.optimizer

    @property
    def feedback(self) -> Mapping[str, Tensor]:
        """Feedback by layer name; read-only, its tensors may be changed in place."""
        return MappingProxyType(self._feedback)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """By name, what else the rule keeps from step to step; the tensors themselves."""
        return {}

    # What a rule implements

    @abstractmethod
    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        """Learn one batch that has been checked; autograd is off.

        Args:
            x: input, [batch, ...].
            y: class of each sample, [batch].
            updates: takes the gradients.
        """

    def _feedback_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of each feedback by its name; ``None`` where the size of the input decides."""
        return {}

    def _prepare(self, sample: tuple[int, ...]) -> None:
        """Make or check what depends on the input; called before the first batch of a new kind.

        Args:
            sample: shape of one sample, without the batch.

        Raises:
            ValueError: a sample that the model cannot take.
        """
        self.network.trace(sample)

    def _after_step(self, samples: int) -> None:  # noqa: B027
        """Do what a step does once every parameter has its new value; autograd is off.

        Args:
            samples: how many samples the batch had.
        """

    def _explain_stage(self, stage: Stage) -> str:
        """How one layer learns."""
        return self._explain_updates(stage, apart="")

    # Learning

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Run a batch and learn from it.

        Nothing waits for the device. Errors of the arguments are raised before anything changes.

        Args:
            x: input, [batch, ...], of the model's dtype and on its device.
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output, of the parameters before the update.

        Raises:
            RuntimeError: the learner has no optimizer, or its backend does not run on this device.
            IndexError: a label out of range, on the CPU (see `bpfree_kernels.set_label_checks`).
            TypeError: arguments of the wrong type or dtype.
            ValueError: an empty batch, or shapes or devices that do not fit.
        """
        updates = self._updates
        if updates is None:
            raise RuntimeError(
                f"step of {type(self).__name__} needs an optimizer, but the learner was made "
                "without one."
            )
        with torch.no_grad():
            self._check_batch(x, y)
            updates.begin()
            result = self._learn(x, y, updates)
            updates.finish()
            self._after_step(x.shape[0])
        return result

    def grads(self, x: Tensor, y: Tensor) -> StepResult:
        """Run a batch and add the rule's gradients to ``.grad``, as ``loss.backward()`` would.

        Every parameter that requires a gradient and that the rule trains gets one, whether or not
        it is in the optimizer. No parameter changes.

        Args:
            x, y: as in `step`.

        Returns:
            Loss and output.

        Raises:
            IndexError, TypeError, ValueError, RuntimeError: as `step`, but no optimizer is needed.
        """
        with torch.no_grad():
            self._check_batch(x, y)
            return self._learn(x, y, GradientStore())

    def loss_grads(self, x: Tensor, y: Tensor) -> StepResult:
        """As `grads`, without what a regulariser of the rule would add."""
        return self.grads(x, y)

    def fit(
        self,
        data: training.Data,
        epochs: int = 1,
        batch_size: int = 64,
        *,
        validation: training.Data | None = None,
        scheduler: training.Scheduler | None = None,
        seed: int = 0,
        start_epoch: int = 0,
        on_batch: Callable[[BatchInfo], None] | None = None,
        on_epoch: Callable[[EpochResult], None] | None = None,
    ) -> list[EpochResult]:
        """Learn for some epochs; see `bpfree.training.fit`."""
        return training.fit(
            self,
            data,
            epochs,
            batch_size,
            validation=validation,
            scheduler=scheduler,
            seed=seed,
            start_epoch=start_epoch,
            on_batch=on_batch,
            on_epoch=on_epoch,
        )

    def evaluate(self, data: training.Data, batch_size: int = 1000) -> EvalResult:
        """Loss and accuracy on some data, without learning; see `bpfree.training.evaluate`."""
        return training.evaluate(self.model, self.loss, data, batch_size)

    def train(self, mode: bool = True) -> Self:
        """Put the model in training mode (dropout on), or out of it."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """Put the model in evaluation mode (dropout off)."""
        return self.train(False)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning changes or depends on; see `bpfree.state.state_dict`."""
        return state.state_dict(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; see `bpfree.state.load_state_dict`."""
        state.load_state_dict(self, saved)

    def check_feedback(self, given: Mapping[str, Tensor]) -> None:
        """Check feedback that replaces the learner's own.

        Args:
            given: feedback by name; not every name has to be there.

        Raises:
            TypeError: something that is no tensor.
            ValueError: an unknown name, or a shape that does not fit.
        """
        shapes = self._feedback_shapes()
        for name, tensor in given.items():
            if name not in shapes:
                raise ValueError(
                    f"feedback has {name!r}, but {type(self).__name__} has feedback for "
                    f"{', '.join(map(repr, shapes)) or 'no layer'}."
                )
            checks.tensor(f"feedback of {name!r}", tensor)
            wanted = shapes[name]
            if name in self.feedback:
                wanted = tuple(self.feedback[name].shape)
            if len(tensor.shape) != len(wanted) or any(
                w not in (None, n) for n, w in zip(tensor.shape, wanted, strict=True)
            ):
                text = ", ".join("any" if w is None else str(w) for w in wanted)
                raise ValueError(
                    f"feedback of {name!r} must have shape ({text}), got {tuple(tensor.shape)}."
                )

    def take_feedback(self, given: Mapping[str, Tensor]) -> None:
        """Replace the learner's feedback by checked feedback; what is left out is made anew."""
        like = self.network.output.layer.weight
        self._feedback.clear()
        for name, tensor in given.items():
            self._feedback[name] = tensor.detach().to(like.device, like.dtype, copy=True)
        self._last_input = None

    def check_buffers(self, given: Mapping[str, Tensor]) -> None:
        """Check tensors that replace `buffers`.

        Raises:
            TypeError: something that is no tensor.
            ValueError: an unknown name, one that is missing, or a shape that does not fit.
        """
        if given:
            raise ValueError(
                f"{type(self).__name__} keeps nothing called {', '.join(map(repr, given))}."
            )

    def take_buffers(self, given: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Replace `buffers` by copies of checked tensors; the feedback is there already."""

    # Explaining

    def explain(self) -> str:
        """Which path updates each layer, and why not a faster one; several lines of text."""
        device = self.network.output.layer.weight.device.type
        if self.backend is not None:
            runs = f"{device}: {self.backend}, as asked for."
        else:
            runs = kernels.explain(device) if self.uses_kernels else f"{device}: torch's own."
        if self._updates is not None:
            self._updates.refresh()
        lines = [f"  {stage}: {self._explain_stage(stage)}" for stage in self.network.stages]
        return "\n".join([f"{type(self).__name__}, loss {describe(self.loss)}, {runs}", *lines])

    def _explain_updates(self, stage: Stage, *, apart: str, op: str = "apply_update") -> str:
        """How the optimizer reaches a layer; `apart`: why `op` applies what another op computed."""
        if self._updates is None:
            return "gradients only, because the learner has no optimizer"
        parameters = dict(stage.layer.named_parameters(recurse=False))
        bridge = self._updates
        learning = {name: p for name, p in parameters.items() if bridge.wants(p)}
        if not learning:
            why = {f"{name}: {bridge.why(p)}" for name, p in parameters.items()}
            return f"frozen ({', '.join(sorted(why))})"
        optimizer = type(bridge.optimizer).__name__
        outside = {bridge.why(p) for p in learning.values()} - {""}
        if outside:
            return f".grad and {optimizer}.step() ({', '.join(sorted(outside))})"
        if apart:
            return f"gradient, then {optimizer} by {op} ({apart})"
        if not bridge.can_fuse(stage.layer.weight, stage.layer.bias):
            return (
                f"gradient, then {optimizer} by apply_update (weight and bias do not learn alike)"
            )
        return f"fused with {optimizer}"

    # Checks

    def _check_layers(self) -> None:
        for stage in self.network.stages:
            if type(stage.layer) not in self.layers:  # exact: an invertible Linear is another thing
                known = ", ".join(kind.__name__ for kind in self.layers)
                raise TypeError(
                    f"{type(self).__name__} trains {known}, but layer {stage.name!r} is a "
                    f"{type(stage.layer).__name__}."
                )
            if stage.activation == "sign" and self.uses_slope:
                raise ValueError(
                    f"{type(self).__name__} needs the derivative of every activation, but that of "
                    f"Signum behind layer {stage.name!r} is 0 everywhere: no layer would ever learn "
                    "through it."
                )

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        """Raise before anything has changed; see `step` for what."""
        for name, tensor in (("x", x), ("y", y)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if x.dim() < 2:
            raise ValueError(f"x must have shape [batch, ...], got {tuple(x.shape)}.")
        checks.not_empty("x", x)
        checks.labels(y, x.shape[0], self.network.classes, x.device)
        dtype, device = x.dtype, x.device
        for stage in self.network.stages:
            weight = stage.layer.weight
            if weight.dtype != dtype or weight.device != device:
                checks.same_kind("x", x, f"layer {stage.name!r}", weight)
        kind = (x.shape[1:], dtype, device)
        if kind != self._last_input:
            checks.floating("x", x)
            self._prepare(tuple(x.shape[1:]))
            self._last_input = kind
