"""The rules' formulas in NumPy and float64, written from the papers, with no code of the library.

Where a formula has several forms, this file takes another one than the kernels (tanh′ as 1/cosh², a
convolution's gradient over explicit patches), so that a slip in one is not repeated in the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def activate(z: Array, activation: str, slope: float) -> tuple[Array, Array]:
    """f(z) and f′(z)."""
    with np.errstate(over="ignore", invalid="ignore"):
        exp_minus = np.exp(-np.abs(z))
        if activation == "identity":
            return z.copy(), np.ones_like(z)
        if activation == "relu":
            return np.maximum(z, 0), np.where(z > 0, 1.0, 0.0)
        if activation == "leaky_relu":
            return np.where(z > 0, z, slope * z), np.where(z > 0, 1.0, slope)
        if activation == "tanh":
            return np.tanh(z), 1 / np.cosh(z) ** 2
        if activation == "sigmoid":
            small = exp_minus / (1 + exp_minus)
            return np.where(z < 0, small, 1 / (1 + exp_minus)), exp_minus / (1 + exp_minus) ** 2
        if activation == "hardtanh":
            inside = np.abs(slope * z) <= 1
            return np.clip(slope * z, -1, 1), np.where(inside, slope, 0.0)
        if activation == "sign":
            return np.sign(z), np.zeros_like(z)
    raise AssertionError(f"no formula for {activation}")


class Layer(NamedTuple):
    """Output and gradients of a dense layer."""

    output: Array
    grad_weight: Array
    grad_bias: Array


def one_hot(labels: Labels, classes: int) -> Array:
    """One-hot rows; a label outside [0, classes) has none."""
    return (np.arange(classes)[None, :] == labels[:, None]).astype(np.float64)


def affine(x: Array, weight: Array, bias: Array | None) -> Array:
    """x Wᵀ + b."""
    z = np.einsum("ni,oi->no", x, weight)
    return z if bias is None else z + bias


def drtp_signal(
    z: Array, feedback: Array, labels: Labels, activation: str, slope: float
) -> tuple[Array, Array]:
    """f(z) and (Y B) ⊙ f′(z), with the label as the one-hot product that the paper prints."""
    y, derivative = activate(z, activation, slope)
    projected = np.einsum("nc,c...->n...", one_hot(labels, feedback.shape[0]), feedback)
    return y, projected * derivative


def drtp_dense(
    x: Array,
    weight: Array,
    bias: Array | None,
    feedback: Array,
    labels: Labels,
    activation: str,
    slope: float,
) -> Layer:
    """Output and gradients of a DRTP layer: sums over the batch, in the gradient convention."""
    z = affine(x, weight, bias)
    y, post = drtp_signal(z, feedback, labels, activation, slope)
    return Layer(y, np.einsum("no,ni->oi", post, x), post.sum(0))


def conv_weight_grad(x: Array, post: Array, kernel: int, padding: int) -> Array:
    """Weight gradient of a stride-1 convolution, [out, in, k, k], over explicit patches."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return np.einsum("nohw,nihwkl->oikl", post, patches)


class Classifier(NamedTuple):
    """What an output layer returns, and its gradients."""

    output: Array
    error: Array
    loss: Array
    grad_weight: Array
    grad_bias: Array


def classifier(
    x: Array,
    weight: Array,
    bias: Array | None,
    labels: Labels,
    loss: str,
    margin: float,
    off_class: float,
) -> Classifier:
    """An output layer and the gradients of its mean loss."""
    z = affine(x, weight, bias)
    batch, classes = z.shape
    target = one_hot(labels, classes)
    if loss == "ce":
        shifted = z - z.max(1, keepdims=True)
        log_output = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        output, scale = np.exp(log_output), 1 / batch
        per_sample = -(target * log_output).sum(1)
    elif loss == "bce":
        output, scale = activate(z, "sigmoid", 0.0)[0], 1 / (batch * classes)
        per_sample = (np.logaddexp(0, z) - target * z).mean(1)
    elif loss == "mse":
        output, scale = z, 2 / (batch * classes)
        per_sample = ((z - target) ** 2).mean(1)
    elif loss == "hinge":
        output, scale = z, 1 / batch
        own, other = np.maximum(margin - z, 0), off_class * np.maximum(margin + z, 0)
        per_sample = np.where(target, own, other).sum(1)
    else:
        raise AssertionError(f"no formula for {loss}")
    error = output - target
    if loss == "hinge":
        error = np.where(target, -1.0 * (z <= margin), off_class * (z >= -margin))
    post = scale * error
    grad_weight = np.einsum("no,ni->oi", post, x)
    return Classifier(output, error, per_sample, grad_weight, post.sum(0))


@dataclass(frozen=True)
class Rule:
    """Hyper-parameters of an update rule, as plain numbers.

    The eps is large, because Adam divides a gradient by its own size: without it the rounding error
    of a gradient near 0 becomes a step of any size, in every implementation.
    """

    name: str
    lr: float = 0.05
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 0.1
    weight_decay: float = 0.0


class Updated(NamedTuple):
    """A parameter and what its rule remembers, after some updates."""

    param: Array
    m: Array
    v: Array


def update(rule: Rule, param: Array, grads: list[Array]) -> Updated:
    """Apply the gradients one after the other, starting from no memory."""
    m, v = np.zeros_like(param), np.zeros_like(param)
    for step, grad in enumerate(grads, start=1):
        if rule.name == "adamw":
            param = param - rule.lr * rule.weight_decay * param
        else:
            grad = grad + rule.weight_decay * param
        if rule.name == "sgd":
            m = rule.momentum * m + grad
            param = param - rule.lr * (grad + rule.momentum * m if rule.nesterov else m)
            continue
        m = rule.betas[0] * m + (1 - rule.betas[0]) * grad
        v = rule.betas[1] * v + (1 - rule.betas[1]) * grad**2
        m_hat, v_hat = m / (1 - rule.betas[0] ** step), v / (1 - rule.betas[1] ** step)
        param = param - rule.lr * m_hat / (np.sqrt(v_hat) + rule.eps)
    return Updated(param, m, v)
