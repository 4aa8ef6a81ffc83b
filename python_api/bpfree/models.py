"""Named networks, as plain ``nn.Sequential`` models that end in their last Linear layer.

``fc<L>-<H>``: L hidden layers of H units, e.g. ``fc1-500``. ``conv``: the DRTP paper's
convolutional networks, one for grey images (MNIST) and one for colour images (CIFAR-10).
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

MODEL_NAMES = "fc<L>-<H> (L hidden layers of H units, such as fc1-500 or fc2-1000) or conv"
"""What a model may be called, in words."""

# Channels of the image: convolutions (maps, kernel size, padding that keeps the image's size), each
# followed by a pooling by 2, and hidden fully connected layers.
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
) -> nn.Sequential:
    """Build a network by name, with PyTorch's default initialisation.

    Args:
        name: ``fc<L>-<H>`` or ``conv``.
        input_shape: shape of one image, (channels, height, width); ``fc`` nets take any shape.
        classes: number of outputs of the last layer, whose activation belongs to the loss.
        activation: activation of every hidden layer, one of `ACTIVATIONS`.
        dropout: probability of dropping an input of a fully connected layer, in [0, 1); 0 for none.
        seed: determines the initial weights, whatever the state of torch's generator.

    Returns:
        A model that maps [N, *input_shape] to [N, classes].

    Raises:
        ValueError: an unknown name or activation, a dropout out of range, or an image that the
            convolutional nets are not made for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    convolutions, hidden = _layers(name, input_shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _sequential(convolutions, hidden, input_shape, classes, activation, dropout)


def _layers(
    name: str, input_shape: Sequence[int]
) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """The convolutions and the hidden fully connected layers that a name stands for."""
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


def _sequential(
    convolutions: Sequence[tuple[int, int, int]],
    hidden: Sequence[int],
    input_shape: Sequence[int],
    classes: int,
    activation: str,
    dropout: float,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    shape = tuple(input_shape)
    for maps, kernel, padding in convolutions:
        channels, height, width = shape
        layers += [nn.Conv2d(channels, maps, kernel, padding=padding), ACTIVATIONS[activation]()]
        layers.append(nn.MaxPool2d(2))
        shape = (maps, height // 2, width // 2)
    layers.append(nn.Flatten())
    features = math.prod(shape)
    for units in (*hidden, classes):
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.Linear(features, units), ACTIVATIONS[activation]()]
        features = units
    return nn.Sequential(*layers[:-1])  # without the last layer's activation
