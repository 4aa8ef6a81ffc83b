"""The rules as plain PyTorch users write them, with autograd and torch.optim, in any dtype.

They set the tolerances (see `tolerances`) and are a second opinion that shares nothing with the
library: DRTP here is the authors' form, a fixed projection put in the place of the true gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .golden import Rule


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    """f(z), differentiable."""
    if activation == "identity":
        return z.clone()
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "hardtanh":
        return (slope * z).clamp(-1, 1)  # whose gradient at ±1 is kept, unlike F.hardtanh's
    return {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sign": torch.sign}[
        activation
    ](z)


def project(feedback: Tensor, labels: Tensor) -> Tensor:
    """The label's one-hot row times B; a row of zeros for a label that is no class."""
    classes = torch.arange(feedback.shape[0], device=labels.device)
    one_hot = (labels[:, None] == classes).to(feedback.dtype)
    return (one_hot @ feedback.flatten(1)).view(labels.shape[0], *feedback.shape[1:])


Ints = int | Sequence[int]


def _both(value: Ints) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Layer(NamedTuple):
    """Output and gradients of a dense layer."""

    output: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def _leaves(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()


def _gradients(of: Tensor, leaves: tuple[Tensor, ...], given: Tensor | None) -> list[Tensor]:
    found = torch.autograd.grad(of, leaves, given, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def drtp_signal(
    z: Tensor, feedback: Tensor, labels: Tensor, activation: str, slope: float
) -> tuple[Tensor, Tensor]:
    """f(z), and the gradient at z when the one at f(z) is B[label]."""
    z = z.detach().clone().requires_grad_()
    y = activate(z, activation, slope)
    return y.detach(), _gradients(y, (z,), project(feedback, labels))[0]


def drtp_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    labels: Tensor,
    activation: str,
    slope: float,
) -> Layer:
    """Output and gradients of a DRTP layer by autograd."""
    leaves = _leaves(weight, bias)
    y = activate(F.linear(x, *leaves), activation, slope)
    return Layer(y.detach(), *_gradients(y, leaves, project(feedback, labels)))


class Gradients(NamedTuple):
    """Gradients of a dense layer."""

    grad_weight: Tensor
    grad_bias: Tensor


def dense(
    post: Tensor, pre: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> Gradients:
    """Gradients of a layer by autograd, from the gradient at its output units."""
    leaves = _leaves(weight, bias)
    return Gradients(*_gradients(F.linear(pre, *leaves), leaves, scale * post))


def local_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """z of a locally connected layer: a shifted copy of the map for each tap; differentiable."""
    kernel, apart, steps = weight.shape[2:4], _both(dilation), _both(stride)
    before = after = _both(0 if isinstance(padding, str) else padding)
    if padding == "same":
        reach = [(k - 1) * d for k, d in zip(kernel, apart, strict=True)]
        before = tuple(r // 2 for r in reach)
        after = tuple(r - b for r, b in zip(reach, before, strict=True))
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    ends = [(n - 1) * step + 1 for n, step in zip(weight.shape[:2], steps, strict=True)]
    taps = [
        padded[:, :, i : i + ends[0] : steps[0], j : j + ends[1] : steps[1]]
        for i in range(0, kernel[0] * apart[0], apart[0])
        for j in range(0, kernel[1] * apart[1], apart[1])
    ]
    windows = torch.stack(taps).unflatten(2, (groups, -1))
    by_group = weight.flatten(2, 3).unflatten(4, (groups, -1))
    z = torch.einsum("kngcrq,rqkcgo->ngorq", windows, by_group).flatten(1, 2)
    return z if bias is None else z + bias.permute(2, 0, 1)


def local_conv_gradients(
    signal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *place: Any
) -> Gradients:
    """Gradients of a locally connected layer by autograd, from the gradient at its output units."""
    start = weight.new_zeros(*weight.shape[:2], weight.shape[5]) if bias is None else bias
    leaves = (weight.detach().clone().requires_grad_(), start.detach().clone().requires_grad_())
    return Gradients(*_gradients(local_conv(x, *leaves, *place), leaves, scale * signal))


def conv_gradients(
    signal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *place: Any
) -> Gradients:
    """Gradients of a convolution by autograd, from the gradient at its output units."""
    leaves = _leaves(weight, bias)
    if x.shape[1] == 0:  # which torch does not convolve: the bias alone
        return Gradients(torch.zeros_like(weight), (scale * signal).sum((0, 2, 3)))
    return Gradients(*_gradients(F.conv2d(x, *leaves, *place), leaves, scale * signal))


def carried_down(error: Tensor, kernel: Tensor, below: Tensor, *place: Any) -> Tensor:
    """What autograd carries down a convolution to an input like `below`, from its output's gradient."""
    x = torch.zeros_like(below, requires_grad=True)
    return _gradients(F.conv2d(x, kernel, None, *place), (x,), error)[0]


def difference(z: Tensor, change: Tensor, activation: str, slope: float) -> Tensor:
    """f(z + Δz) − f(z), subtracted in float64: what an exact function of rounded arguments gives."""
    after = activate(z.double() + change.double(), activation, slope)
    return (after - activate(z.double(), activation, slope)).to(z.dtype)


def pepita_dense(
    z: Tensor,
    pre: Tensor,
    change: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    mask: Tensor | None,
    activation: str,
    slope: float,
) -> Layer:
    """Change of the output of a PEPITA layer and its gradients, the change carried through."""
    change = change if feedback is None else change @ feedback.t()
    changed = difference(z, F.linear(change, weight), activation, slope)
    changed = changed if mask is None else changed * mask
    return Layer(changed, *dense(changed, pre, weight, bias, -1 / z.shape[0]))


class Classifier(NamedTuple):
    """What an output layer returns, and its gradients."""

    output: Tensor
    error: Tensor
    loss: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def hinge(z: Tensor, target: Tensor, margin: float, off_class: float) -> Tensor:
    """Multi-class hinge loss of each sample; differentiable, by clamp also at its thresholds."""
    own, other = (margin - z).clamp(min=0), (margin + z).clamp(min=0)
    return (target * own + off_class * (1 - target) * other).sum(1)


def classifier(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    margin: float,
    off_class: float,
) -> Classifier:
    """An output layer with torch's own loss, and the gradients that autograd gives it."""
    leaves = _leaves(weight, bias)
    z = F.linear(x, *leaves)
    target = F.one_hot(labels.long(), z.shape[1]).to(z.dtype)
    if loss == "ce":
        output, mean_loss = z.softmax(1), F.cross_entropy(z, labels.long())
        per_sample = F.cross_entropy(z, labels.long(), reduction="none")
    elif loss == "bce":
        output, mean_loss = z.sigmoid(), F.binary_cross_entropy_with_logits(z, target)
        per_sample = F.binary_cross_entropy_with_logits(z, target, reduction="none").mean(1)
    elif loss == "mse":
        output, mean_loss = z, F.mse_loss(z, target)
        per_sample = F.mse_loss(z, target, reduction="none").mean(1)
    else:
        output, per_sample = z, hinge(z, target, margin, off_class)
        mean_loss = per_sample.mean()
    error = output - target
    if loss == "hinge":
        (error,) = torch.autograd.grad(per_sample.sum(), z, retain_graph=True)
    gradients = _gradients(mean_loss, leaves, None)
    return Classifier(output.detach(), error.detach(), per_sample.detach(), *gradients)


def optimizer(rule: Rule, params: list[Tensor]) -> torch.optim.Optimizer:
    """The torch optimizer of a rule. Its ``foreach`` form is off: each parameter by itself."""
    if rule.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=rule.lr,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            nesterov=rule.nesterov,
            foreach=False,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[rule.name]
    return kind(
        params,
        lr=rule.lr,
        betas=rule.betas,
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        foreach=False,
    )


def update(rule: Rule, param: Tensor, grads: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The parameter after the gradients given, and torch's state of it."""
    leaf = param.detach().clone().requires_grad_()
    optim = optimizer(rule, [leaf])
    for grad in grads:
        leaf.grad = grad.clone()
        optim.step()
    return leaf.detach(), optim.state[leaf]
