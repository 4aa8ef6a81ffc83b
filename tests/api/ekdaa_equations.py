"""EKDAA's equations in NumPy and float64, written from the paper, with no code of the library.

As in `urfb_equations`, every layer is a dense matrix, that of its error kernel, too. Targets are formed and
subtracted as the paper has them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from urfb_equations import Array, Layer, gathered, matrix, winners

Gradients = tuple[list[Array], list[Array]]


def ekdaa_gradients(
    layers: list[Layer],
    feedback: list[Array],
    x: Array,
    labels: NDArray[np.int64],
    *,
    f: Callable[[Array], Array],
    beta: float,
    upsample: str,
) -> Gradients:
    """∂W and ∂b (one value for each unit of z) of every layer, summed over the batch; loss softmax and CE.

    ∂E is γ times ∂W, and a mean over the batch the sum's N-th part.

    Args:
        layers: from the first on; pooling of 2 by 2 follows where they say so.
        feedback: E of every layer but the first.
        x: [N, units], maps channel by channel.
        labels: [N].
        f: activation of every layer but the last.
        beta: how far an error moves a target.
        upsample: how an error passes a pooling.
    """
    inputs, fields = [x], []
    for layer in layers:
        z = inputs[-1] @ matrix(layer, layer.weight, inputs[-1].shape[1]).T + layer.bias
        fields.append(z)
        h = f(z)
        inputs.append(np.take_along_axis(h, winners(z, layer), 1) if layer.pool else h)
    logits = fields[-1]
    e = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    e[np.arange(len(e)), labels] -= 1
    weights, biases = [], []
    for place in reversed(range(len(layers))):
        layer, h = layers[place], inputs[place]
        weights.append(gathered(layer, e.T @ h))
        biases.append(e.sum(0))
        if place == 0:
            break
        d = e @ matrix(layer, feedback[place - 1], h.shape[1])
        below, z = layers[place - 1], fields[place - 1]
        if below.pool:
            d = _upsampled(d, z, below, upsample)
        target = f(z - beta * d)
        e = f(z) - target
    return weights[::-1], biases[::-1]


def _upsampled(d: Array, z: Array, layer: Layer, upsample: str) -> Array:
    """d of the pooled units, at the units of z."""
    if upsample == "argmax":
        spread = np.zeros_like(z)
        np.put_along_axis(spread, winners(z, layer), d, 1)
        return spread
    assert layer.size is not None
    rows, columns = (n + 2 * layer.padding - layer.weight.shape[2] + 1 for n in layer.size)
    maps = d.reshape(len(d), -1, rows // 2, columns // 2)
    if upsample == "bilinear":
        up = np.einsum("ir,ncrq,jq->ncij", _between(rows), maps, _between(columns))
    else:
        up = maps.repeat(2, axis=2).repeat(2, axis=3) / (4 if upsample == "average" else 1)
    return up.reshape(len(d), -1)


def _between(size: int) -> Array:
    """Linear interpolation from size/2 values to twice as many, [size, size / 2].

    Value i lies at (i + ½)/2 − ½ among the given ones, at the border at the outermost.
    """
    rows = np.zeros((size, size // 2))
    for i in range(size):
        at = max((i + 0.5) / 2 - 0.5, 0)
        low, part = int(at), at % 1
        rows[i, low] += 1 - part
        rows[i, min(low + 1, size // 2 - 1)] += part
    return rows
