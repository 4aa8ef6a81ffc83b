"""Locally connected layers of every geometry, with tensors for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .golden import Array
from .tolerances import to_numpy


@dataclass(frozen=True)
class Layer:
    """A geometry, and how many samples and channels go through it.

    Attributes:
        batch, inputs, outputs: numbers of samples and of channels.
        size, kernel: height and width of the map and of the window.
        place: stride, padding, dilation and groups, where they are not torch's defaults.
    """

    batch: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    place: dict[str, Any]

    @property
    def where(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups, in the order of the formulas."""
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        return tuple((defaults | self.place).values())

    @property
    def tied_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the convolution of this geometry."""
        return (self.outputs, self.inputs // self.where[3], *self.kernel)

    def positions(self) -> tuple[int, ...]:
        """Rows and columns of the output: those of torch's convolution."""
        x = torch.empty(1, self.inputs, *self.size, device="meta")
        return tuple(
            F.conv2d(x, torch.empty(self.tied_shape, device="meta"), **self.place).shape[2:]
        )

    def with_batch(self, batch: int) -> Layer:
        """The same geometry for another number of samples."""
        return replace(self, batch=batch)


LAYERS = {
    "one weight": Layer(1, 1, 1, (1, 1), (1, 1), {}),
    "one position": Layer(5, 3, 4, (3, 2), (3, 2), {"padding": "valid"}),
    "border": Layer(5, 3, 4, (4, 5), (3, 3), {"padding": 1}),
    "larger than the map": Layer(1, 3, 5, (2, 3), (5, 4), {"padding": 2}),
    "stride": Layer(2, 3, 17, (6, 5), (3, 3), {"stride": 2, "padding": 1}),
    "stride beyond the window": Layer(2, 3, 2, (7, 6), (2, 1), {"stride": (3, 2)}),
    "same, even window": Layer(3, 5, 3, (4, 3), (2, 4), {"padding": "same"}),
    "same, dilated": Layer(2, 1, 3, (5, 4), (3, 2), {"padding": "same", "dilation": (2, 3)}),
    "dilation": Layer(2, 2, 3, (7, 6), (3, 2), {"padding": (1, 0), "dilation": (2, 3)}),
    "groups": Layer(4, 6, 9, (4, 3), (2, 2), {"groups": 3}),
    "one channel a group": Layer(3, 5, 10, (3, 4), (3, 3), {"padding": 1, "groups": 5}),
    "one row": Layer(7, 3, 33, (1, 9), (1, 3), {"stride": (1, 2), "padding": (0, 1)}),
    "one column": Layer(2, 3, 1, (6, 1), (3, 1), {}),
    "many outputs": Layer(17, 17, 70, (3, 3), (2, 2), {}),
    "many inputs": Layer(2, 33, 17, (2, 3), (2, 2), {"padding": (0, 1)}),
    "many positions": Layer(3, 5, 6, (9, 9), (2, 1), {}),
    "many samples": Layer(70, 3, 5, (3, 3), (2, 2), {}),
    "everything": Layer(
        3, 4, 6, (7, 8), (3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    ),
}  # fmt: skip
"""By what is special about each."""


@dataclass
class Drawn:
    """The tensors of a layer."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    signal: Tensor
    gate: Tensor


def draw(
    layer: Layer, dtype: torch.dtype, device: str, *, seed: int = 0, grid: bool = False
) -> Drawn:
    """Normal values; or on a grid where sums of products are exact in every dtype, kinks included."""
    rng = np.random.default_rng(seed)
    rows, columns = layer.positions()
    fan_in = layer.inputs // layer.where[3] * layer.kernel[0] * layer.kernel[1]
    kernels = (rows, columns, *layer.kernel, layer.tied_shape[1], layer.outputs)

    def values(*size: int, spread: float = 1.0) -> Tensor:
        array = rng.integers(-4, 5, size) / 4 if grid else spread * rng.standard_normal(size)
        return torch.from_numpy(np.asarray(array)).to(device, dtype)

    maps = (layer.batch, layer.inputs, *layer.size)
    return Drawn(
        x=values(*maps),
        weight=values(*kernels, spread=max(fan_in, 1) ** -0.5),
        bias=values(rows, columns, layer.outputs),
        signal=values(layer.batch, layer.outputs, rows, columns),
        gate=values(*maps),
    )


def arrays(*tensors: Tensor | None) -> list[Array | None]:
    """The tensors' values in float64."""
    return [None if tensor is None else to_numpy(tensor) for tensor in tensors]
