"""What EKDAA's backward of a convolution is compared with: the same formula in torch, and backprop's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

BETA, GAMMA, LR, MOMENTUM = 0.9, 0.1, 1e-9, 0.9


@dataclass
class Layer:
    """One convolution, 3×3 padded by 1, its error, and the units below it.

    Attributes:
        z: pre-activation of the units below, [batch, channels, size, size].
        x: input of the layer, tanh(z), max-pooled if `pooled`.
        error: at the layer's output, shaped like `x`.
        weight: W, [channels, channels, 3, 3].
        feedback: E, shaped like `weight`.
        momenta: momentum buffers of W and E.
        pooled: whether 2×2 max pooling lies between z and the layer.
        winners: where torch's pooling found each maximum.
    """

    z: Tensor
    x: Tensor
    error: Tensor
    weight: Tensor
    feedback: Tensor
    momenta: tuple[Tensor, Tensor]
    pooled: bool
    winners: Tensor | None


def make_layer(
    channels: int, size: int, batch: int, device: str, *, pooled: bool, dtype: torch.dtype
) -> Layer:
    """A layer with random tensors, maps with the channels last, as torch is fastest."""
    torch.manual_seed(0)
    below = 2 * size if pooled else size
    last = torch.channels_last

    def maps(side: int) -> Tensor:
        made = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        return made.contiguous(memory_format=last)

    z = maps(below)
    x, winners = torch.tanh(z), None
    if pooled:
        x, winners = F.max_pool2d(x, 2, return_indices=True)
    weight, feedback = (
        torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
        for _ in range(2)
    )
    momenta = (torch.zeros_like(weight), torch.zeros_like(feedback))
    return Layer(z, x, maps(size), weight, feedback, momenta, pooled, winners)


def formula(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """EKDAA's backward as written: error below, and the gradients of W and E."""
    d = F.conv_transpose2d(layer.error, layer.feedback, padding=1)
    if layer.winners is not None:
        d = F.max_unpool2d(d, layer.winners, 2)
    target = torch.tanh(layer.z - BETA * d)
    below = torch.tanh(layer.z) - target
    gradient = conv2d_weight(layer.x, layer.weight.shape, layer.error, padding=1)
    return below, gradient, GAMMA * gradient


def backprop(layer: Layer) -> tuple[Tensor, Tensor]:
    """Backprop's: the gradient at z, and that of W."""
    of_x, of_weight = bare(layer)
    if layer.winners is not None:
        of_x = torch.ops.aten.max_pool2d_with_indices_backward(
            of_x, layer.z, [2, 2], [2, 2], [0, 0], [1, 1], False, layer.winners
        )
        y = torch.tanh(layer.z)
    else:
        y = layer.x
    return torch.ops.aten.tanh_backward(of_x, y), of_weight


def bare(layer: Layer) -> tuple[Tensor, Tensor]:
    """torch's convolution backward alone: both of its products."""
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        layer.error, layer.x, layer.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    return of_x, of_weight


def update(layer: Layer, of_weight: Tensor, of_feedback: Tensor) -> None:
    """SGD with momentum on W and E."""
    pairs = ((layer.weight, of_weight), (layer.feedback, of_feedback))
    for (parameter, gradient), momentum in zip(pairs, layer.momenta, strict=True):
        momentum.mul_(MOMENTUM).add_(gradient)
        parameter.add_(momentum, alpha=-LR)
