"""What locally connected layers are compared with: the ways to write one in torch, and bare products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Layer:
    """One untied layer with square maps and kernels, "same" padding, and tensors for it.

    Attributes:
        x: input, [batch, in, size, size].
        weight: [size, size, kernel, kernel, in, out].
        signal: at the output, [batch, out, size, size].
    """

    x: Tensor
    weight: Tensor
    signal: Tensor

    @property
    def kernel(self) -> int:
        return self.weight.shape[2]

    @property
    def padding(self) -> int:
        return self.kernel // 2


def make_layer(inputs: int, outputs: int, size: int, kernel: int, batch: int, device: str) -> Layer:
    """A layer with random tensors."""
    torch.manual_seed(0)
    weight = torch.randn(size, size, kernel, kernel, inputs, outputs, device=device)
    return Layer(
        torch.randn(batch, inputs, size, size, device=device),
        weight / (kernel * inputs**0.5),
        torch.randn(batch, outputs, size, size, device=device),
    )


def by_position(layer: Layer) -> Tensor:
    """The weight as unfold orders its windows, [position, in·kernel·kernel, out], a tensor of its own."""
    weight = layer.weight.permute(0, 1, 4, 2, 3, 5).flatten(0, 1).flatten(1, 3)
    return weight.contiguous()


def windows(layer: Layer, x: Tensor) -> Tensor:
    """[position, batch, in·kernel·kernel]: the copy of the input that im2col makes."""
    return F.unfold(x, layer.kernel, padding=layer.padding).permute(2, 0, 1).contiguous()


def unfold_forward(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """unfold + bmm, [batch, out, size, size]."""
    z = torch.bmm(windows(layer, x), weight)
    return z.permute(1, 2, 0).reshape(layer.signal.shape)


def unfold_step(layer: Layer, x: Tensor, weight: Tensor, signal: Tensor, lr: float) -> Tensor:
    """unfold + bmm, and the update by baddbmm in place."""
    copies = windows(layer, x)
    z = torch.bmm(copies, weight).permute(1, 2, 0).reshape(layer.signal.shape)
    posts = signal.flatten(2).permute(2, 0, 1)
    torch.baddbmm(weight, copies.transpose(1, 2), posts, alpha=-lr, out=weight)
    return z


def broadcast_forward(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The recipe that forums pass on: windows times weight by broadcasting, summed."""
    places = F.unfold(x, layer.kernel, padding=layer.padding).permute(0, 2, 1)
    z = (places[..., None] * weight).sum(2)
    return z.permute(0, 2, 1).reshape(layer.signal.shape)


def bare_products(layer: Layer, *, update: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous operands of the batched products: windows, weight and signal by position."""
    posts = layer.signal.flatten(2).permute(2, 0, 1).contiguous() if update else layer.signal
    return windows(layer, layer.x), by_position(layer), posts
