"""Named networks, as plain ``nn.Sequential`` models that end in their last Linear layer.

``fc<L>-<H>``: L hidden layers of H units, e.g. ``fc1-500``. ``conv``: the DRTP paper's
convolutional networks, one for grey images (MNIST) and one for colour images (CIFAR-10).
``conv-pepita``: the PEPITA paper's, for any images: 32 filters of 5×5 without padding, pooling, output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh,
}
"""Hidden activations by name."""

INITS = ("torch", "he")
"""Initialisations by name."""

MODEL_NAMES = (
    "fc<L>-<H> (L hidden layers of H units, such as fc1-500 or fc2-1000), conv or conv-pepita"
)
"""What a model may be called, in words."""

# Convolutions (maps, kernel size, padding), each followed by a pooling by 2, and hidden fully connected
# layers; those of ``conv`` by the channels of the image.
_CONV_NETS: dict[int, tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]] = {
    1: (((32, 5, 2),), (1000,)),
    3: (((64, 3, 1), (256, 3, 1)), (1000, 1000)),
}


def build_model(
    name: str,
    input_shape: Sequence[int],
    classes: int,
    activation: str = "tanh",
    dropout: float = 0.0,
    seed: int = 0,
    *,
    input_dropout: bool = True,
    bias: bool = True,
    init: str = "torch",
) -> nn.Sequential:
    """Build a network by name.

    Args:
        name: ``fc<L>-<H>``, ``conv`` or ``conv-pepita``.
        input_shape: shape of one image, (channels, height, width); ``fc`` nets take any shape.
        classes: number of outputs of the last layer, whose activation belongs to the loss.
        activation: activation of every hidden layer, one of `ACTIVATIONS`.
        dropout: probability of dropping an input of a fully connected layer, in [0, 1); 0 for none.
        seed: determines the initial weights, whatever the state of torch's generator.
        input_dropout: whether `dropout` also drops values of the image itself, in ``fc`` nets.
        bias: whether layers have biases.
        init: ``"torch"``, PyTorch's default, or ``"he"``, He uniform: weights in
            ±√(6 / fan_in), biases 0.

    Returns:
        A model that maps [N, *input_shape] to [N, classes].

    Raises:
        ValueError: an unknown name, activation or initialisation, a dropout out of range, or an image
            that the convolutional nets are not made for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}.")
    convolutions, hidden = _layers(name, input_shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body, shape = _convolutions(convolutions, input_shape, activation, bias)
        drops = [dropout] * (1 + len(hidden))
        if not (convolutions or input_dropout):
            drops[0] = 0.0
        head = _dense(math.prod(shape), (*hidden, classes), activation, drops, bias)
        model = nn.Sequential(*body, nn.Flatten(), *head)
        if init == "he":
            _init_he(model)
        return model


def _layers(
    name: str, input_shape: Sequence[int]
) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """The convolutions and the hidden fully connected layers that a name stands for."""
    if name == "conv-pepita":
        if len(input_shape) != 3 or min(input_shape[1:]) < 6:
            raise ValueError(
                "model conv-pepita is made for images of shape (channels, height, width) of 6 by 6 "
                f"at least, got {tuple(input_shape)}."
            )
        return ((32, 5, 0),), ()
    if name == "conv":
        channels = input_shape[0] if len(input_shape) == 3 else None
        if channels not in _CONV_NETS:
            raise ValueError(
                "model conv is made for images of shape (1, height, width) or (3, height, width), "
                f"got {tuple(input_shape)}."
            )
        return _CONV_NETS[channels]
    match = re.fullmatch(r"fc([1-9]\d*)-([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"model must be {MODEL_NAMES}, got {name!r}.")
    return (), (int(match[2]),) * int(match[1])


def _convolutions(
    convolutions: Sequence[tuple[int, int, int]],
    input_shape: Sequence[int],
    activation: str,
    bias: bool,
) -> tuple[list[nn.Module], tuple[int, ...]]:
    """The convolutional part, and the shape of what leaves it."""
    layers: list[nn.Module] = []
    shape = tuple(input_shape)
    for maps, kernel, padding in convolutions:
        channels, height, width = shape
        layers += [
            nn.Conv2d(channels, maps, kernel, padding=padding, bias=bias),
            ACTIVATIONS[activation](),
            nn.MaxPool2d(2),
        ]
        shrink = kernel - 1 - 2 * padding
        shape = (maps, (height - shrink) // 2, (width - shrink) // 2)
    return layers, shape


def _dense(
    features: int, widths: Sequence[int], activation: str, drops: Sequence[float], bias: bool
) -> list[nn.Module]:
    """The fully connected part, with a dropout ahead of each layer whose share is not 0."""
    layers: list[nn.Module] = []
    for units, drop in zip(widths, drops, strict=True):
        if drop:
            layers.append(nn.Dropout(drop))
        layers += [nn.Linear(features, units, bias=bias), ACTIVATIONS[activation]()]
        features = units
    return layers[:-1]  # without the last layer's activation


def _init_he(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight)  # gain √2: ±√(6 / fan_in)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
