"""A convolution's forward and feedback without autograd, for rules with their own signal."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def channels_last(maps: Tensor) -> Tensor:
    """The same maps with the channels last in memory, on the CPU: torch is several times faster then."""
    if maps.device.type != "cpu":
        return maps
    _, channels, height, width = maps.shape
    # With one channel a map lies both ways, and torch looks at the strides to choose for its result.
    strides = (height * width * channels, 1, width * channels, channels)
    return maps.contiguous(memory_format=torch.channels_last).as_strided(maps.shape, strides)


def by_place(maps: Tensor) -> Tensor:
    """Maps [batch, channels, height, width] as [batch, height·width, channels].

    A view if the channels lie last in memory, else a copy.
    """
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


class Convolution:
    """The arguments of a `torch.nn.Conv2d`, read once.

    ``padding="same"`` with an even kernel pads one more on the right and below. torch's convolution
    takes symmetric padding only, so that one is added to the input beforehand.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._dilation = _pair(layer.dilation)
        self._extra: tuple[int, int] = (0, 0)
        if isinstance(layer.padding, str):
            reach = [
                d * (k - 1) if layer.padding == "same" else 0
                for d, k in zip(self._dilation, layer.kernel_size, strict=True)
            ]
            self._padding = (reach[0] // 2, reach[1] // 2)
            self._extra = (reach[0] % 2, reach[1] % 2)
        else:
            self._padding = _pair(layer.padding)

    def pad(self, x: Tensor) -> Tensor:
        """The input as `forward` wants it, [batch, channels, height, width]."""
        below, right = self._extra
        return F.pad(x, (0, right, 0, below)) if below or right else x

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activation z = W ∗ x + b of a padded input (`pad`)."""
        layer = self._layer
        return F.conv2d(
            x, layer.weight, layer.bias, layer.stride, self._padding, self._dilation, layer.groups
        )

    def linear(self, x: Tensor) -> Tensor:
        """W ∗ x of a padded input (`pad`), without bias: how z changes if the input does by x."""
        layer = self._layer
        return F.conv2d(
            x, layer.weight, None, layer.stride, self._padding, self._dilation, layer.groups
        )

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Carry a signal down: the gradient of the input, with other weights in the place of W.

        Args:
            signal: gradient at z, [batch, out, out_height, out_width].
            weight: R, shaped like the layer's weight.
            x: padded input (`pad`); only its size is read.

        Returns:
            Signal at the input before `pad`, [batch, channels, height, width].
        """
        layer = self._layer
        of_x = torch.ops.aten.convolution_backward(
            signal, x, weight, None, layer.stride, self._padding, self._dilation,
            False, [0, 0], layer.groups, [True, False, False],
        )[0]  # fmt: skip
        below, right = self._extra
        return cast(Tensor, of_x[:, :, : x.shape[2] - below, : x.shape[3] - right])
