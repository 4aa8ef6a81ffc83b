"""PEPITA's formulas and a dense layer's halves, in NumPy, with no code of the library.

PEPITA as the paper prints it: two whole passes, one subtracted from the other. What that loses in
float64 is kept by carrying the subtraction itself in more digits.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from .golden import Array, Labels, activate, affine, classifier


class Gradients(NamedTuple):
    """Gradients of a dense layer."""

    grad_weight: Array
    grad_bias: Array


class Layer(NamedTuple):
    """Change of a layer's output, and the layer's gradients."""

    change: Array
    grad_weight: Array
    grad_bias: Array


def dense(
    post: Array, pre: Array, weight: Array | None, bias: Array | None, scale: float
) -> Gradients:
    """Gradients of a layer from the signal at its output units and from its input."""
    return Gradients(scale * np.einsum("no,ni->oi", post, pre), scale * post.sum(0))


def subtract(z: Array, change: Array, activation: str, slope: float) -> Array:
    """f(z + Δz) − f(z) as it stands, in extended precision where the platform has it."""
    wide = z.astype(np.longdouble)
    after = activate(wide + change, activation, slope)[0]
    return (after - activate(wide, activation, slope)[0]).astype(np.float64)


def layer(
    z: Array,
    pre: Array,
    change: Array,
    weight: Array,
    bias: Array | None,
    feedback: Array | None,
    mask: Array | None,
    activation: str,
    slope: float,
) -> Layer:
    """A hidden layer: the first pass minus the second, times pre, as a mean over the batch."""
    perturbation = change if feedback is None else np.einsum("nc,ic->ni", change, feedback)
    changed = subtract(z, affine(perturbation, weight, None), activation, slope)
    changed = changed if mask is None else changed * mask
    return Layer(changed, -np.einsum("no,ni->oi", changed, pre) / len(z), -changed.mean(0))


def _clip(values: Any) -> Any:
    return np.where(values > 1, 1, np.where(values < -1, -1, values))


def _sign(values: Any) -> Any:
    return (values > 0).astype(np.int64) - (values < 0)


def difference(z: Array, change: Array, activation: str, slope: float) -> Array:
    """f(z + Δz) − f(z), right in every digit however small Δz is.

    In fractions where f is piecewise linear, else as sinh Δz / (cosh z · cosh(z + Δz)).
    """
    if activation in ("tanh", "sigmoid"):
        factor = np.longdouble(1 if activation == "tanh" else 0.5)
        wide, step = z * factor, change * factor  # sigmoid z = (1 + tanh(z / 2)) / 2
        with np.errstate(over="ignore", invalid="ignore"):
            exact = np.sinh(step) / (np.cosh(wide) * np.cosh(wide + step))
            rough = np.tanh(wide + step) - np.tanh(wide)
        return (factor * np.where(np.abs(step) < 1, exact, rough)).astype(np.float64)
    fractions = np.vectorize(Fraction, otypes=[object])
    before, step, gain = fractions(z), fractions(change), Fraction(slope)
    after = before + step
    if activation == "identity":
        result = after - before
    elif activation in ("relu", "leaky_relu"):
        low = gain if activation == "leaky_relu" else 0
        result = np.where(after > 0, after, low * after) - np.where(
            before > 0, before, low * before
        )
    elif activation == "hardtanh":
        result = _clip(gain * after) - _clip(gain * before)
    elif activation == "sign":
        result = _sign(after) - _sign(before)
    else:
        raise AssertionError(f"no formula for {activation}")
    return result.astype(np.float64)


class Hidden(NamedTuple):
    """A hidden layer of a network: weight, bias or ``None``, dropout mask or ``None``."""

    weight: Array
    bias: Array | None
    mask: Array | None


def _pass(x: Array, hidden: list[Hidden], activation: str, slope: float) -> list[Array]:
    """What every layer sees: the network's input, then each hidden layer's output."""
    seen = [x]
    for weight, bias, mask in hidden:
        h = activate(affine(seen[-1], weight, bias), activation, slope)[0]
        seen.append(h if mask is None else h * mask)
    return seen


def two_passes(
    x: Array,
    hidden: list[Hidden],
    output: Hidden,
    feedback: Array,
    labels: Labels,
    activation: str,
    slope: float,
    *,
    modulated: bool = True,
    second_error: bool = False,
) -> list[Gradients]:
    """All gradients of one step of PEPITA with cross-entropy, the output layer's last.

    Args:
        x, labels: the batch.
        hidden, output: the layers.
        feedback: F, [in, classes].
        activation, slope: of the hidden layers.
        modulated: h′ as the presynaptic factor, as the paper's algorithm has it; else h.
        second_error: the output layer learns from the second pass's error instead of the first's.
    """
    first = _pass(x, hidden, activation, slope)
    error = classifier(first[-1], output.weight, output.bias, labels, "ce", 0.0, 0.0).error
    second = _pass(x + np.einsum("nc,ic->ni", error, feedback), hidden, activation, slope)
    pre = second if modulated else first
    gradients = [
        dense(first[index + 1] - second[index + 1], pre[index], None, None, 1 / len(x))
        for index in range(len(hidden))
    ]
    if second_error:
        error = classifier(second[-1], output.weight, output.bias, labels, "ce", 0.0, 0.0).error
    return [*gradients, dense(error, pre[-1], None, None, 1 / len(x))]


def convolution(x: Array, weight: Array, bias: Array, padding: int) -> Array:
    """A stride-1 convolution over explicit patches."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    return np.einsum("nihwkl,oikl->nohw", patches, weight) + bias[:, None, None]
