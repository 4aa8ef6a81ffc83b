"""What our kernels are compared with: the same formulas in plain torch, as a good programmer writes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OptimizerMaker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def mlp(
    widths: list[int], device: str, activation: type[nn.Module] = nn.Tanh, *, bias: bool = True
) -> nn.Sequential:
    """A network of Linear layers, the same weights every time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).to(device)


def linears(model: nn.Sequential) -> list[nn.Linear]:
    """The trainable layers of `mlp`."""
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def drtp_gradients(
    layers: list[nn.Linear], feedback: list[Tensor], x: Tensor, labels: Tensor
) -> None:
    """DRTP with sigmoid + BCE by its equations, no autograd: fills .grad of every layer."""
    with torch.no_grad():
        for layer, rows in zip(layers, feedback, strict=False):
            y = torch.tanh(F.linear(x, layer.weight, layer.bias))
            post = rows[labels] * (1 - y * y)
            layer.weight.grad, layer.bias.grad = post.t() @ x, post.sum(0)
            x = y
        last = layers[-1]
        probabilities = torch.sigmoid(F.linear(x, last.weight, last.bias))
        target = F.one_hot(labels, last.out_features).to(x.dtype)
        post = (probabilities - target) / probabilities.numel()
        last.weight.grad, last.bias.grad = post.t() @ x, post.sum(0)


def drtp_step(
    model: nn.Sequential,
    feedback: list[Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """The equations of DRTP in eager torch, and torch's optimizer."""
    layers = linears(model)

    def step() -> None:
        drtp_gradients(layers, feedback, x, labels)
        optimizer.step()

    return step


def backprop_step(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    loss: str = "bce",
) -> Callable[[], None]:
    """A backprop step with sigmoid + BCE or softmax + CE: autograd and torch's optimizer."""
    target = F.one_hot(labels, linears(model)[-1].out_features).to(x.dtype)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if loss == "bce":
            F.binary_cross_entropy_with_logits(model(x), target).backward()
        else:
            F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def bare_products(model: nn.Sequential, x: Tensor) -> Callable[[], None]:
    """Only the matrix products that a step of a local rule needs: forward and update of each layer."""
    weights = [layer.weight.detach() for layer in linears(model)]

    def step() -> None:
        activations = [x]
        for weight in weights:
            activations.append(torch.mm(activations[-1], weight.t()))
        for below, above in itertools.pairwise(activations):
            torch.mm(above.t(), below)

    return step
