"""GAIT-prop's equations in NumPy and float64, written from the paper, with no code of the library.

As in `urfb_equations`, every layer is a dense matrix, units channel by channel, so that those that are handed
on come first. Inverses are those of `numpy.linalg.inv`. Both forms are here: errors, and targets one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from urfb_equations import Array, Layer, gathered, matrix

Gradients = tuple[list[Array], list[Array]]


@dataclass
class Net:
    """Layers z = W h + b with f the leaky ReLU, but for the last; no pooling.

    Attributes:
        layers: from the first on.
        handed: how many units each hands on, the first ones.
        slope: of f below 0.
    """

    layers: list[Layer]
    handed: list[int]
    slope: float = 0.1

    def f(self, z: Array, place: int) -> Array:
        """Activation of a layer."""
        return np.where(z > 0, z, self.factor(place) * z)

    def factor(self, place: int) -> float:
        """Slope below 0."""
        return 1.0 if place == len(self.layers) - 1 else self.slope

    def derivative(self, z: Array, place: int) -> Array:
        """f′ of a layer."""
        return np.where(z > 0, 1.0, self.factor(place))

    def run(self, x: Array) -> tuple[list[Array], list[Array]]:
        """Every layer's input and z of all its units."""
        inputs, fields = [x], []
        for place, layer in enumerate(self.layers):
            h = inputs[-1]
            fields.append(h @ matrix(layer, layer.weight, h.shape[1]).T + layer.bias)
            inputs.append(self.f(fields[-1], place)[:, : self.handed[place]])
        return inputs[:-1], fields

    def back(self, place: int, inputs: int) -> Array:
        """What carries a layer's units to its inputs by the inverse, [units, inputs]."""
        layer = self.layers[place]
        square = layer.weight.reshape(len(layer.weight), -1)
        kernel = np.linalg.inv(square).T.reshape(layer.weight.shape)
        return matrix(layer, kernel, inputs)

    def counts(self, place: int, inputs: int) -> Array:
        """In how many windows each input lies, [inputs]."""
        layer = self.layers[place]
        touched = matrix(layer, np.ones_like(layer.weight), inputs).sum(0)
        return touched / len(layer.weight)

    def penalty(self, place: int, factor: float, off_diagonal: bool = False) -> Array:
        """Gradient of the regulariser, by its definition Σ_ij (W Wᵀ − I)²_ij, entry after entry."""
        weight = self.layers[place].weight
        square = weight.reshape(len(weight), -1)
        grad = np.zeros_like(square)
        for i, j in np.ndindex(len(square), len(square)):
            if i == j and off_diagonal:
                continue
            off = square[i] @ square[j] - (i == j)
            grad[i] += 2 * factor * off * square[j]
            grad[j] += 2 * factor * off * square[i]
        return grad.reshape(weight.shape)


def _output_error(z: Array, classes: int, labels: NDArray[np.int64]) -> Array:
    """∂Loss/∂z of softmax and cross-entropy, summed over the batch; 0 for auxiliary units."""
    logits = z[:, :classes]
    error = np.zeros_like(z)
    error[:, :classes] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error[np.arange(len(z)), labels] -= 1
    return error


def error_gradients(net: Net, x: Array, labels: NDArray[np.int64]) -> Gradients:
    """∂W and ∂b (a value for each unit of z), sums over the batch, by errors that the inverse carries."""
    inputs, fields = net.run(x)
    delta = _output_error(fields[-1], net.handed[-1], labels)
    weights, biases = [], []
    for place in reversed(range(len(net.layers))):
        h = inputs[place]
        weights.append(gathered(net.layers[place], delta.T @ h))
        biases.append(delta.sum(0))
        if place == 0:
            break
        arrived = delta @ net.back(place, h.shape[1])
        delta = np.zeros_like(fields[place - 1])
        gate = net.derivative(fields[place - 1], place - 1)[:, : arrived.shape[1]]
        delta[:, : arrived.shape[1]] = arrived * gate
    return weights[::-1], biases[::-1]


def target_gradients(
    net: Net,
    x: Array,
    labels: NDArray[np.int64],
    *,
    eta: float | None = 1e-7,
    rate: float = 1e-3,
) -> Gradients:
    """The same from targets: those of a layer's inputs are what its nudged output inverts to.

    Args:
        net, x, labels: as above.
        eta: of the normalised form; None for the vanilla one.
        rate: γ of that.
    """
    inputs, fields = net.run(x)
    last = len(net.layers) - 1
    target = fields[last] - _output_error(fields[last], net.handed[last], labels) / 2
    times = np.ones(len(x))
    weights, biases = [], []
    for place in reversed(range(last + 1)):
        h, z = inputs[place], fields[place]
        a, slope = net.f(z, place), net.derivative(z, place)
        delta = 2 * times[:, None] * slope * (a - target)
        weights.append(gathered(net.layers[place], delta.T @ h))
        biases.append(delta.sum(0))
        if place == 0:
            break
        gamma = np.full(len(x), rate)
        if eta is not None:
            gamma = eta * np.sqrt(a.shape[1]) / np.linalg.norm(target - a, axis=1)
        weigh = gamma[:, None] * slope**2
        u = (1 - weigh) * a + weigh * target
        inverted = np.where(u > 0, u, u / net.factor(place)) - net.layers[place].bias
        n = net.counts(place, h.shape[1])
        reached = inverted @ net.back(place, h.shape[1]) - (n - 1) * h
        target = net.f(fields[place - 1], place - 1)
        target[:, : h.shape[1]] = reached
        times = times / gamma
    return weights[::-1], biases[::-1]
