"""How a learner sees a model: a row of stages, each a layer that can learn and what belongs to it.

::

    nn.Sequential(Flatten, Linear, Tanh, Dropout, Linear)
                  -------  ---------------------  ------
                  before   stage 0                stage 1: the output

The model stays the user's: a stage refers to its modules and owns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.nn import (
    InvertibleConv2d,
    InvertibleLinear,
    LocallyConnected2d,
    SaturatedLinear,
    Signum,
)
from bpfree.nn.invertible import Invertible
from bpfree_kernels.activations import resolve_activation
from bpfree_kernels.reference.activations import activate

Layer = nn.Linear | nn.Conv2d | LocallyConnected2d | InvertibleLinear | InvertibleConv2d
"""What can learn."""

PASSED_THROUGH = (nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d)
"""Modules that run as they are between the layers; nothing in them learns."""

SUPPORTED = (
    "Sequential, Linear, Conv2d, bpfree.nn.LocallyConnected2d, bpfree.nn.InvertibleLinear, "
    "bpfree.nn.InvertibleConv2d, Flatten, MaxPool2d, AvgPool2d, "
    "Dropout, Dropout2d, Identity, ReLU, LeakyReLU, Tanh, Sigmoid, Hardtanh(-1, 1), "
    "bpfree.nn.SaturatedLinear, bpfree.nn.Signum"
)
"""Every module that a model may consist of, for error messages."""

_PLAIN_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", Signum: "sign"}


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer, its activation, and the modules between it and the next layer.

    Attributes:
        name: the layer's name in the model, e.g. ``"1"`` or ``"0.2"``.
        position: 0 for the first layer of the model, 1 for the next.
        layer: the module that holds weight and bias.
        activation: name of f (see `bpfree_kernels.ACTIVATIONS`).
        slope: parameter of f, ``None`` where it has none.
        activation_module: the module that computes f, ``None`` for the identity.
        after: modules that run on the layer's output f(z): pooling, dropout, flattening.
    """

    name: str
    position: int
    layer: Layer
    activation: str
    slope: float | None
    activation_module: nn.Module | None
    after: tuple[nn.Module, ...]

    @property
    def outputs(self) -> int:
        """Number of outputs, or channels, that are handed on: all but the auxiliary ones."""
        layer = self.layer
        if isinstance(layer, Invertible):
            return layer.outputs
        return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels

    @property
    def has_auxiliary(self) -> bool:
        """Whether some outputs are not handed on."""
        return isinstance(self.layer, Invertible) and self.outputs < len(self.layer.weight)

    def first(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the outputs that are handed on: the parameters, or views of them."""
        layer = self.layer
        if isinstance(layer, Invertible):
            return layer.first(layer.outputs)
        return layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """f(W x + b), as the modules compute it."""
        z = self.layer(x)
        return cast(Tensor, z if self.activation_module is None else self.activation_module(z))

    def activate(self, z: Tensor) -> Tensor:
        """f(z), which leaves z as it is (even if the module works in place); runs no hooks."""
        module = self.activation_module
        if module is None:
            return z
        return cast(Tensor, module.forward(z.clone() if getattr(module, "inplace", False) else z))

    def gate(self, signal: Tensor, z: Tensor) -> Tensor:
        """signal ⊙ f′(z), shaped like both."""
        if self.activation == "identity":
            return signal
        return signal * activate(z, self.activation, self.slope or 0.0)[1]

    def leave(self, y: Tensor) -> Tensor:
        """Run the modules between this layer's output and the next layer."""
        return run_modules(self.after, y)

    def __str__(self) -> str:
        f = "" if self.activation == "identity" else f" + {self.activation}"
        return f"{self.name}: {self.layer}{f}"


@dataclass(frozen=True, eq=False)
class Network:
    """A model as its stages.

    Attributes:
        before: modules ahead of the first layer.
        hidden: every layer but the last.
        output: the last layer, whose output are the logits, [batch, classes].
    """

    before: tuple[nn.Module, ...]
    hidden: tuple[Stage, ...]
    output: Stage

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every layer in order."""
        return (*self.hidden, self.output)

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.output.outputs

    def enter(self, x: Tensor) -> Tensor:
        """Run the modules ahead of the first layer."""
        return run_modules(self.before, x)

    def entering(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which one sample enters the first layer, without the batch.

        Args:
            shape: shape of a sample, without the batch.

        Raises:
            ValueError: a sample that does not fit the modules ahead of the first layer.
        """
        x = torch.empty((1, *shape), device="meta")
        return tuple(_trace_modules(self.before, x, shape).shape[1:])

    def trace(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Send the shape of one sample through the model, without computing anything.

        Args:
            shape: shape of a sample, without the batch.

        Returns:
            For each layer's name, the shape of its pre-activation z, without the batch.

        Raises:
            ValueError: a layer that the sample does not fit.
        """
        x = torch.empty((1, *shape), device="meta")
        shapes = {}
        modules = self.before
        for stage in self.stages:
            x = _trace_modules(modules, x, shape)
            x = _trace_layer(stage, x, shape)
            shapes[stage.name] = tuple(x.shape[1:])
            modules = stage.after
        return shapes


def run_modules(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Apply modules one after another."""
    for module in modules:
        x = module(x)
    return x


def parse(model: nn.Module) -> Network:
    """Take a model apart into stages.

    Raises:
        TypeError: a model that is no `torch.nn.Sequential`, or a module that is not supported.
        ValueError: a module in a place where it cannot be, an option of a module that is not
            supported, two layers with the same weight, or a model that does not end in its logits.
    """
    if not _is_sequential(model):
        raise TypeError(f"model must be a torch.nn.Sequential, got {type(model).__name__}.")
    modules = [(n, m) for n, m in _leaves(model, "") if type(m) is not nn.Identity]
    starts = [i for i, (_, m) in enumerate(modules) if isinstance(m, Layer)]
    if not starts or not isinstance(modules[-1][1], nn.Linear):
        ending = f"ends in {_label(*modules[-1])}" if modules else "is empty"
        raise ValueError(
            f"model must end in torch.nn.Linear, whose output are the logits, but it {ending}; "
            "the loss brings the output's own activation."
        )
    before = modules[: starts[0]]
    _refuse_activations(before)
    stages = [
        _make_stage(position, modules[start:stop])
        for position, (start, stop) in enumerate(
            zip(starts, [*starts[1:], len(modules)], strict=True)
        )
    ]
    _refuse_shared_weights(stages)
    return Network(tuple(m for _, m in before), tuple(stages[:-1]), stages[-1])


def _is_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after another and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _leaves(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_modules(): that leaves out the second place of a module that is used twice.
    for name, child in model._modules.items():
        if child is None:
            continue
        if _is_sequential(child):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            _check_module(prefix + name, child)
            yield prefix + name, child


def _label(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})"


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse what a learner cannot run."""
    kind = type(module)  # exact: a subclass may compute anything
    if kind in get_args(Layer):
        _check_layer(name, cast(Layer, module))
    elif kind is nn.MaxPool2d:
        if cast(nn.MaxPool2d, module).return_indices:
            raise ValueError(f"module {_label(name, module)} must not return indices.")
    elif kind not in PASSED_THROUGH and kind is not nn.Identity:
        _activation(name, module)


def _check_layer(name: str, layer: Layer) -> None:
    if not isinstance(layer.weight, nn.Parameter):
        raise TypeError(
            f"the weight of module {_label(name, layer)} must be a torch.nn.Parameter, "
            f"got {type(layer.weight).__name__}."
        )
    if isinstance(layer, LocallyConnected2d) and layer.input_size is None:
        raise ValueError(
            f"module {_label(name, layer)} has no input_size yet: give it one, or run a batch through "
            "the model first."
        )
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise ValueError(
            f"padding_mode of module {_label(name, layer)} must be 'zeros', "
            f"got {layer.padding_mode!r}."
        )


def _activation(name: str, module: nn.Module) -> tuple[str, float | None]:
    """Name and parameter of an activation module.

    Raises:
        TypeError: a module that is no supported activation.
        ValueError: parameters that are not supported.
    """
    kind = type(module)
    if kind in _PLAIN_ACTIVATIONS:
        return _PLAIN_ACTIVATIONS[kind], None
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        if not module.negative_slope > 0:
            raise ValueError(
                f"negative_slope of module {_label(name, module)} must be positive, "
                f"got {module.negative_slope}."
            )
        return resolve_activation("leaky_relu", module.negative_slope)
    if isinstance(module, SaturatedLinear) and kind is SaturatedLinear:
        return resolve_activation("hardtanh", module.slope)
    if isinstance(module, nn.Hardtanh) and kind is nn.Hardtanh:
        if (module.min_val, module.max_val) != (-1, 1):
            raise ValueError(
                f"the bounds of module {_label(name, module)} must be -1 and 1, "
                f"got {module.min_val} and {module.max_val}."
            )
        return resolve_activation("hardtanh", None)
    raise TypeError(f"module {_label(name, module)} is not supported; supported are {SUPPORTED}.")


def _make_stage(position: int, modules: list[tuple[str, nn.Module]]) -> Stage:
    """A stage from a layer and every module up to the next layer."""
    name, layer = modules[0]
    activation: tuple[str, float | None] = ("identity", None)
    activation_module = None
    after = modules[1:]
    if after and type(after[0][1]) not in PASSED_THROUGH:
        activation, activation_module = _activation(*after[0]), after[0][1]
        after = after[1:]
    _refuse_activations(after)
    return Stage(
        name,
        position,
        cast(Layer, layer),
        *activation,
        activation_module,
        tuple(module for _, module in after),
    )


def _refuse_activations(modules: list[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if type(module) not in PASSED_THROUGH:
            raise ValueError(
                f"activation {_label(name, module)} must follow a layer directly, "
                "because the rules take its slope at that layer's output; pool, drop and flatten "
                "after it."
            )


def _refuse_shared_weights(stages: list[Stage]) -> None:
    owners: dict[int, str] = {}
    for stage in stages:
        for parameter in stage.layer.parameters(recurse=False):
            other = owners.setdefault(id(parameter), stage.name)
            if other != stage.name:
                raise ValueError(
                    f"layers {other!r} and {stage.name!r} share a parameter; each layer learns by "
                    "itself, so each needs its own."
                )


def _trace_modules(modules: Iterable[nn.Module], x: Tensor, shape: tuple[int, ...]) -> Tensor:
    for module in modules:
        try:
            x = module.forward(x)  # hooks are for real batches
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"a sample of shape {tuple(shape)} does not fit module {module}: {error}"
            ) from error
    return x


def _trace_layer(stage: Stage, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    layer, arrives = stage.layer, tuple(x.shape[1:])
    sample = f"a sample of shape {tuple(shape)} does not fit layer {stage.name!r}"
    if isinstance(layer, nn.Linear):
        if arrives != (layer.in_features,):
            raise ValueError(
                f"{sample}: {layer} needs {layer.in_features} features, but gets {arrives}."
            )
        return x.new_empty(1, stage.outputs)
    if isinstance(layer, LocallyConnected2d):
        wanted = (layer.in_channels, *(layer.input_size or ()))
        if arrives != wanted:
            raise ValueError(f"{sample}: {layer} needs a map of {wanted}, but gets {arrives}.")
        rows, columns = layer.weight.shape[:2]
        return x.new_empty(1, layer.out_channels, rows, columns)
    if len(arrives) != 3 or arrives[0] != layer.in_channels:
        raise ValueError(
            f"{sample}: {layer} needs a map of ({layer.in_channels}, height, width), "
            f"but gets {arrives}."
        )
    x, padding = layer.pad(x) if isinstance(layer, InvertibleConv2d) else (x, layer.padding)
    try:
        weight = torch.empty_like(stage.first()[0], dtype=x.dtype, device="meta")
        return F.conv2d(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)
    except RuntimeError as error:
        raise ValueError(f"{sample}: {error}") from error
