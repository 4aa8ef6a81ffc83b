"""The rules as plain PyTorch users write them, with autograd and torch.optim, in any dtype.

They set the tolerances (see `tolerances`) and are a second opinion that shares nothing with the
library: DRTP here is the authors' form, a fixed projection put in the place of the true gradient.
"""

from __future__ import annotations

from typing import NamedTuple

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


def classifier(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss: str
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
    else:
        output, mean_loss = z, F.mse_loss(z, target)
        per_sample = F.mse_loss(z, target, reduction="none").mean(1)
    gradients = _gradients(mean_loss, leaves, None)
    return Classifier(output.detach(), (output - target).detach(), per_sample.detach(), *gradients)


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
