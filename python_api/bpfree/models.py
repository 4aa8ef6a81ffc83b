"""Named networks, as plain ``nn.Sequential`` models that end in their last Linear layer.

``fc<L>-<H>``: L hidden layers of H units, e.g. ``fc1-500``. ``conv``: the DRTP paper's
convolutional networks, one for grey images (MNIST) and one for colour images (CIFAR-10).
``conv-pepita``: the PEPITA paper's, for any images: 32 filters of 5×5 without padding, pooling, output.
``simpnet``: the URFB paper's, for any images: 32 filters of 5×5, pooling of 3×3 by steps of 2, 500 units,
output; saturated linear, dropout of 0.8 and 0.3 ahead of the two fully connected layers, no biases, Glorot.
``ekdaa``: the EKDAA paper's for Fashion-MNIST, for any images: 32, 64 and 128 filters of 3×3, the first two
pooled, 128 units, output; tanh, no biases, Glorot.
``gait<L>-<H>``: L hidden layers of H units and an output layer of H units of which the classes are handed on,
all but the first invertible; leaky ReLU of slope 0.1, orthogonal weights, biases 0. ``gait-shallow`` and
``gait-deep``: the GAIT paper's for CIFAR-10, gait3-1024 and gait6-1024. ``gait-conv``: a small one for any
images: 16 filters of 3×3 by steps of 2, the same invertible, output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from bpfree.nn import InvertibleConv2d, InvertibleLinear, SaturatedLinear, Signum, untie

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "leaky_relu_0.1": partial(nn.LeakyReLU, 0.1),
    "hardtanh": nn.Hardtanh,
    "saturated_linear": SaturatedLinear,
    "sign": Signum,
}
"""Hidden activations by name."""

INITS = ("torch", "he", "glorot", "orthogonal")
"""Initialisations by name."""

MODEL_NAMES = (
    "fc<L>-<H> (L hidden layers of H units, such as fc1-500 or fc2-1000), gait<L>-<H> (the same, "
    "with invertible layers), gait-shallow (gait3-1024), gait-deep (gait6-1024), gait-conv, conv, "
    "conv-pepita, simpnet or ekdaa"
)
"""What a model may be called, in words."""


class _Conv(NamedTuple):
    """A convolution; `pooled` says whether a max pooling follows it."""

    maps: int
    kernel: int
    padding: int
    pooled: bool = True
    stride: int = 1


@dataclass(frozen=True)
class _Plan:
    """The layers that a name stands for, and what the net has unless asked otherwise.

    Attributes:
        convolutions: the convolutions.
        hidden: units of each hidden fully connected layer.
        pool: (kernel size, stride, padding) of the max poolings.
        activation, bias, init: as for `build_model`.
        dropout: share to drop ahead of each fully connected layer; empty for none anywhere.
        invertible: whether every layer but the first is invertible; a convolution's maps are then those
            that it hands on, and hidden fully connected layers are as wide as what enters them.
    """

    convolutions: tuple[_Conv, ...] = ()
    hidden: tuple[int, ...] = ()
    pool: tuple[int, int, int] = (2, 2, 0)
    activation: str = "tanh"
    dropout: tuple[float, ...] = ()
    bias: bool = True
    init: str = "torch"
    invertible: bool = False


_CONV_PEPITA = _Plan((_Conv(32, 5, 0),))
# The paper centres the pooling windows on every second pixel; its code begins them there.
_SIMPNET = _Plan(
    (_Conv(32, 5, 2),), (500,), (3, 2, 1), "saturated_linear", (0.8, 0.3), bias=False, init="glorot"
)
_EKDAA = _Plan(
    (_Conv(32, 3, 1), _Conv(64, 3, 1), _Conv(128, 3, 1, pooled=False)),
    (128,),
    bias=False,
    init="glorot",
)
_GAIT = _Plan(activation="leaky_relu_0.1", init="orthogonal", invertible=True)
_GAIT_CONV = replace(_GAIT, convolutions=(_Conv(16, 3, 1, False, 2), _Conv(16, 3, 1, False, 2)))
_GAIT_HIDDEN = {"gait-shallow": (1024,) * 3, "gait-deep": (1024,) * 6}
# With the least height and width of an image.
_FOR_ANY_IMAGE = {
    "simpnet": (_SIMPNET, 1),
    "conv-pepita": (_CONV_PEPITA, 6),
    "ekdaa": (_EKDAA, 4),
    "gait-conv": (_GAIT_CONV, 1),
}
# By the channels of the image.
_CONV = {
    1: _Plan((_Conv(32, 5, 2),), (1000,)),
    3: _Plan((_Conv(64, 3, 1), _Conv(256, 3, 1)), (1000, 1000)),
}


def build_model(
    name: str,
    input_shape: Sequence[int],
    classes: int,
    activation: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    *,
    input_dropout: bool = True,
    bias: bool | None = None,
    init: str | None = None,
    untied: bool = False,
) -> nn.Sequential:
    """Build a network by name.

    ``None`` takes what the net has in its paper: tanh, no dropout, biases and PyTorch's initialisation,
    but for ``simpnet``, ``ekdaa`` and the ``gait`` nets as the module says.

    Args:
        name: ``fc<L>-<H>``, ``gait<L>-<H>`` or one of the others that the module names.
        input_shape: shape of one image, (channels, height, width); nets without convolutions take any.
        classes: number of outputs of the last layer, whose activation belongs to the loss.
        activation: activation of every hidden layer, one of `ACTIVATIONS`.
        dropout: probability of dropping an input of a fully connected layer, in [0, 1); 0 for none.
        seed: determines the initial weights, whatever the state of torch's generator.
        input_dropout: whether `dropout` also drops values of the image itself, in ``fc`` nets.
        bias: whether layers have biases.
        init: ``"torch"``, PyTorch's default, ``"he"``, He uniform: weights in ±√(6 / fan_in), biases
            0, ``"glorot"``, Glorot uniform: ±√(6 / (fan_in + fan_out)), biases 0, or
            ``"orthogonal"``: orthogonal rows or columns, whichever are fewer, biases 0.
        untied: whether locally connected layers take the place of the convolutions; their weights
            begin alike everywhere, as those of the convolutions.

    Returns:
        A model that maps [N, *input_shape] to [N, classes].

    Raises:
        ValueError: an unknown name, activation or initialisation, a dropout out of range, an image
            that the convolutional nets are not made for, a net without convolutions to untie, or more
            classes than an invertible output layer has units.
    """
    plan = _plan(name, input_shape)
    activation = plan.activation if activation is None else activation
    bias = plan.bias if bias is None else bias
    init = plan.init if init is None else init
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}.")
    if untied and not plan.convolutions:
        raise ValueError(f"untied needs a model with convolutions, got {name!r}.")
    own = plan.dropout or (0.0,) * (1 + len(plan.hidden))
    drops = own if dropout is None else (dropout,) * len(own)
    if not (plan.convolutions or input_dropout):
        drops = (0.0, *drops[1:])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body, shape = _convolutions(plan, input_shape, activation, bias)
        head = _dense(math.prod(shape), plan, classes, activation, drops, bias)
        model = nn.Sequential(*body, nn.Flatten(), *head)
        if init != "torch":
            _initialise(model, init)
    if untied:
        untie(model, tuple(input_shape))
    return model


def _plan(name: str, input_shape: Sequence[int]) -> _Plan:
    """The net that a name stands for."""
    if name in _FOR_ANY_IMAGE:
        plan, least = _FOR_ANY_IMAGE[name]
        if len(input_shape) != 3 or min(input_shape[1:]) < least:
            raise ValueError(
                f"model {name} is made for images of shape (channels, height, width) of {least} by "
                f"{least} at least, got {tuple(input_shape)}."
            )
        return plan
    if name == "conv":
        channels = input_shape[0] if len(input_shape) == 3 else None
        if channels not in _CONV:
            raise ValueError(
                "model conv is made for images of shape (1, height, width) or (3, height, width), "
                f"got {tuple(input_shape)}."
            )
        return _CONV[channels]
    if name in _GAIT_HIDDEN:
        return replace(_GAIT, hidden=_GAIT_HIDDEN[name])
    match = re.fullmatch(r"(fc|gait)([1-9]\d*)-([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"model must be {MODEL_NAMES}, got {name!r}.")
    return replace(_Plan() if match[1] == "fc" else _GAIT, hidden=(int(match[3]),) * int(match[2]))


def _convolutions(
    plan: _Plan, input_shape: Sequence[int], activation: str, bias: bool
) -> tuple[list[nn.Module], tuple[int, ...]]:
    """The convolutional part, and the shape of what leaves it."""
    layers: list[nn.Module] = []
    shape = tuple(input_shape)
    window, hop, margin = plan.pool
    for place, (maps, kernel, padding, pooled, stride) in enumerate(plan.convolutions):
        channels, *size = shape
        layer: nn.Module
        if plan.invertible and place > 0:
            layer = InvertibleConv2d(channels, kernel, stride, padding, features=maps, bias=bias)
        else:
            layer = nn.Conv2d(channels, maps, kernel, stride, padding, bias=bias)
        layers += [layer, ACTIVATIONS[activation]()]
        size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        if pooled:
            layers.append(nn.MaxPool2d(window, hop, margin))
            size = [(n + 2 * margin - window) // hop + 1 for n in size]
        shape = (maps, *size)
    return layers, shape


def _dense(
    features: int, plan: _Plan, classes: int, activation: str, drops: Sequence[float], bias: bool
) -> list[nn.Module]:
    """The fully connected part, with a dropout ahead of each layer whose share is not 0."""
    layers: list[nn.Module] = []
    first = not plan.convolutions
    for units, drop in zip((*plan.hidden, classes), drops, strict=True):
        if drop:
            layers.append(nn.Dropout(drop))
        if plan.invertible and not first:
            layers.append(InvertibleLinear(features, bias, outputs=units))
        else:
            layers.append(nn.Linear(features, units, bias))
        layers.append(ACTIVATIONS[activation]())
        features, first = units, False
    return layers[:-1]  # without the last layer's activation


def _initialise(model: nn.Sequential, init: str) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if init == "he":
                nn.init.kaiming_uniform_(layer.weight)  # gain √2: ±√(6 / fan_in)
            elif init == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
