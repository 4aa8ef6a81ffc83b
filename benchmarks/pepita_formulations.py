"""What our PEPITA kernels are compared with, beside the authors' formulation (`bpfree.plain`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from formulations import linears
from torch import Tensor, nn

from bpfree_kernels.maps import map_order


def difference_form(
    model: nn.Sequential,
    feedback: Tensor,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """A dense ReLU net by the formula that we use, the first layer in low rank, in eager torch."""
    layers = linears(model)

    def gradients() -> None:
        inputs, zs = [x], []
        for layer in layers:
            zs.append(F.linear(inputs[-1], layer.weight))
            inputs.append(torch.relu(zs[-1]))
        error = torch.softmax(zs[-1], 1) - F.one_hot(labels, zs[-1].shape[1]).to(x.dtype)
        pre = torch.addmm(x, error, feedback.t())
        change = error
        for number, layer in enumerate(layers[:-1]):
            moved = layer.weight @ feedback if number == 0 else layer.weight
            z = zs[number]
            change = torch.relu(z + change @ moved.t()) - inputs[number + 1]
            layer.weight.grad = change.t() @ pre / -len(x)
            pre = inputs[number + 1] + change
        layers[-1].weight.grad = error.t() @ pre / len(x)

    def step() -> None:
        with torch.no_grad():
            gradients()
        optimizer.step()

    return step


def bare_products(model: nn.Sequential, feedback: Tensor, x: Tensor) -> Callable[[], None]:
    """Only the matrix products of the difference form: forward, W F, its use, and the updates."""
    first, second = (layer.weight.detach() for layer in linears(model))
    error = torch.rand(len(x), feedback.shape[1], device=x.device, dtype=x.dtype)

    def step() -> None:
        hidden = torch.mm(x, first.t())
        torch.mm(hidden, second.t())
        change = torch.mm(error, torch.mm(first, feedback).t())
        torch.mm(change.t(), x)
        torch.mm(error.t(), hidden)

    return step


def _convolution(model: nn.Sequential) -> tuple[nn.Conv2d, nn.Linear]:
    return next(m for m in model if isinstance(m, nn.Conv2d)), linears(model)[-1]


def needed_operations(model: nn.Sequential, feedback: Tensor, x: Tensor) -> Callable[[], None]:
    """The torch operations that a step of conv, ReLU, pool 2, FC needs, without bookkeeping.

    Two convolutions, the mixture, ReLU's difference, two poolings, two weight gradients, and the dense
    layer's products and update. All maps lie as x does; channels last, flattening copies.
    """
    convolution, last = _convolution(model)
    order = map_order(x)
    weight = convolution.weight.detach().contiguous(memory_format=order)
    dense = last.weight.detach()
    images = feedback.t().reshape(-1, *x.shape[1:]).contiguous(memory_format=order)
    error = torch.rand(len(x), feedback.shape[1], device=x.device, dtype=x.dtype)

    def weight_gradient(inputs: Tensor, signal: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            signal, inputs, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [False, True, False],
        )[1]  # fmt: skip

    def step() -> None:
        z = F.conv2d(x, weight)
        y = torch.relu(z)
        pooled, _ = F.max_pool2d(y, 2, return_indices=True)
        torch.softmax(torch.mm(pooled.flatten(1), dense.t()), 1)
        basis = F.conv2d(images, weight)
        moved = torch.mm(error, basis.flatten(1)).view_as(z)
        change = torch.relu(z + moved) - y
        _, moved_winners = F.max_pool2d(y + change, 2, return_indices=True)
        change.flatten(2).gather(2, moved_winners.flatten(2))
        mixed = torch.mm(error.t(), change.flatten(1)).view_as(basis)
        weight_gradient(x, change)
        weight_gradient(images, mixed)
        torch.mm(error.t(), pooled.flatten(1))

    return step


def update_by_position(model: nn.Sequential, feedback: Tensor, x: Tensor) -> Callable[[], None]:
    """The convolution's update as the authors' code forms it: a loop over the output's positions.

    At each, the products of every sample's difference and patch, averaged over the batch.
    """
    convolution, _ = _convolution(model)
    weight = convolution.weight.detach()
    error = torch.rand(len(x), feedback.shape[1], device=x.device, dtype=x.dtype)
    kernel = weight.shape[2]

    def step() -> None:
        perturbed = x + (error @ feedback.t()).view_as(x)
        change = torch.relu(F.conv2d(x, weight)) - torch.relu(F.conv2d(perturbed, weight))
        total = torch.zeros_like(weight)
        height, width = change.shape[2:]
        for i in range(height):
            for j in range(width):
                patch = perturbed[:, None, :, i : i + kernel, j : j + kernel]
                total += (change[:, :, i, j, None, None, None] * patch).mean(0)
        weight.sub_(total, alpha=1e-9 / (height * width))

    return step
