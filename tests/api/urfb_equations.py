"""URFB's equations in NumPy and float64, written from the paper, with no code of the library.

Every layer is a dense matrix here: that of a convolution or a locally connected layer has its weights where
a window lies, zeros elsewhere. Feedback is a product with the transpose, whatever the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Layer:
    """A layer z = W h + b, then f(z) = clip(slope·z, −1, 1) unless it is the last, then pooling.

    Attributes:
        weight: [out, in], [out, in, k, k] or [rows, columns, k, k, in, out].
        bias: one value for each unit of z, [units].
        size: height and width of the input map; None for a dense layer.
        padding: zeros around it.
        pool: whether max pooling of 2 by 2 follows, on maps of even size.
    """

    weight: Array
    bias: Array
    size: tuple[int, int] | None = None
    padding: int = 0
    pool: bool = False


def _uses(layer: Layer, weight: Array) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Unit of z, unit of the input, and place of the weight between them."""
    if layer.size is None:
        yield from ((o, i, (o, i)) for o, i in np.ndindex(weight.shape))
        return
    height, width = layer.size
    untied = weight.ndim == 6
    side, channels, out = weight.shape[2], weight.shape[4 if untied else 1], weight.shape[-1]
    out = out if untied else weight.shape[0]
    rows, columns = (n + 2 * layer.padding - side + 1 for n in layer.size)
    for r, q, i, j, c, o in np.ndindex(rows, columns, side, side, channels, out):
        y, x = r + i - layer.padding, q + j - layer.padding
        if 0 <= y < height and 0 <= x < width:
            place = (r, q, i, j, c, o) if untied else (o, c, i, j)
            yield (o * rows + r) * columns + q, (c * height + y) * width + x, place


def matrix(layer: Layer, weight: Array, inputs: int) -> Array:
    """A layer's weight, or another that lies like it, between all inputs and all units, [units, inputs]."""
    full = np.zeros((layer.bias.size, inputs))
    for unit, source, place in _uses(layer, weight):
        full[unit, source] = weight[place]
    return full


def gathered(layer: Layer, full: Array) -> Array:
    """The gradient of a weight from that of the matrix: a sum over the places where it is used."""
    grad = np.zeros_like(layer.weight)
    for unit, source, place in _uses(layer, layer.weight):
        grad[place] += full[unit, source]
    return grad


def winners(h: Array, layer: Layer) -> NDArray[np.int64]:
    """Of each window of 2 by 2, which unit has the maximum, the first of equals; [N, windows]."""
    assert layer.size is not None
    side = layer.weight.shape[2]
    rows, columns = (n + 2 * layer.padding - side + 1 for n in layer.size)
    units = np.arange(h.shape[1]).reshape(-1, rows, columns)
    windows = np.stack(
        [units[:, i::2, j::2].reshape(-1) for i in (0, 1) for j in (0, 1)], axis=1
    )  # [windows, 4]
    return windows[np.arange(len(windows)), h[:, windows].argmax(2)]


def urfb_gradients(
    layers: list[Layer], feedback: list[Array], x: Array, labels: NDArray[np.int64], slope: float
) -> tuple[list[Array], list[Array]]:
    """∂W and ∂b (one value for each unit of z) of every layer, with the hinge loss.

    Args:
        layers: from the first on.
        feedback: R of every layer but the first.
        x: [N, units], maps channel by channel.
        labels: [N].
        slope: slope of f.
    """
    inputs, fields, chosen = [x], [], []
    for layer in layers:
        z = inputs[-1] @ matrix(layer, layer.weight, inputs[-1].shape[1]).T + layer.bias
        fields.append(z)
        h = np.clip(slope * z, -1, 1)
        first = winners(h, layer) if layer.pool else None
        chosen.append(first)
        inputs.append(h if first is None else np.take_along_axis(h, first, 1))
    samples, classes = fields[-1].shape
    right = labels[:, None] == np.arange(classes)
    delta = np.where(right, -1.0 * (fields[-1] <= 1), (fields[-1] >= -1) / (classes - 1))
    weights, biases = [], []
    for place in reversed(range(len(layers))):
        layer, h = layers[place], inputs[place]
        weights.append(gathered(layer, delta.T @ h / samples))
        biases.append(delta.mean(0))
        if place == 0:
            break
        arrived = delta @ matrix(layer, feedback[place - 1], h.shape[1])
        first, z = chosen[place - 1], fields[place - 1]
        if first is not None:
            spread = np.zeros_like(z)
            np.put_along_axis(spread, first, arrived, 1)
            arrived = spread
        delta = arrived * slope * (np.abs(slope * z) <= 1)
    return weights[::-1], biases[::-1]
