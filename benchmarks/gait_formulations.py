"""What a GAIT-prop step is compared with: the same formula in eager torch, and backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = Sequence[nn.Linear]
"""Dense layers with a leaky ReLU between them; the last hands on its first outputs."""

SLOPE = 0.1


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def difference_gradients(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
) -> list[tuple[Tensor, Tensor]]:
    """GAIT-prop's gradients in the difference form, every square weight inverted by torch."""
    inputs, fields = [x], []
    for weight, bias in zip(weights, biases, strict=True):
        fields.append(F.linear(inputs[-1], weight, bias))
        inputs.append(F.leaky_relu(fields[-1], SLOPE))
    error = torch.zeros_like(fields[-1])
    error[:, :classes] = fields[-1][:, :classes].softmax(1) - F.one_hot(y, classes)
    gradients = []
    for place in reversed(range(len(weights))):
        weight = weights[place]
        of_weight = error.t() @ inputs[place]
        if place:
            off = weight @ weight.t() - torch.eye(
                len(weight), dtype=weight.dtype, device=weight.device
            )
            of_weight = of_weight + 4 * penalty * (off @ weight)
        gradients.append((of_weight, error.sum(0)))
        if place:
            slope = torch.where(fields[place - 1] > 0, 1.0, SLOPE)
            error = (error @ torch.linalg.inv(weight).t()) * slope
    return gradients[::-1]


def difference_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, classes: int, penalty: float, compiled: bool
) -> Callable[[Tensor, Tensor], None]:
    """A step of it; with torch.compile, but for the optimizer's own kernel."""
    layers = layers_of(model)
    formula = torch.compile(difference_gradients) if compiled else difference_gradients

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> None:
        weights, biases = (
            [getattr(la, name).detach() for la in layers] for name in ("weight", "bias")
        )
        found = formula(weights, biases, x.flatten(1), y, classes, penalty)
        for layer, (of_weight, of_bias) in zip(layers, found, strict=True):
            layer.weight.grad, layer.bias.grad = of_weight, of_bias
        optimizer.step()

    return step


def backprop_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, penalty: float, *, closed: bool
) -> Callable[[Tensor, Tensor], None]:
    """Autograd, with the same regulariser as one more loss, or its gradient in closed form added."""
    square = layers_of(model)[1:]

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y, reduction="sum")
        if not closed:
            for layer in square:
                off = layer.weight @ layer.weight.t() - torch.eye(len(layer.weight)).to(
                    layer.weight
                )
                loss = loss + penalty * off.square().sum()
        loss.backward()
        if closed:
            with torch.no_grad():
                for layer in square:
                    off = layer.weight @ layer.weight.t()
                    off.diagonal().sub_(1)
                    layer.weight.grad.addmm_(off, layer.weight, alpha=4 * penalty)
        optimizer.step()

    return step
