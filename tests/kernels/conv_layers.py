"""Convolutions of every geometry with error kernels, and max poolings below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree_kernels.geometry import MaxPool

from .local_layers import LAYERS as UNTIED
from .local_layers import Layer

LAYERS = {
    **UNTIED,
    "one pixel": Layer(3, 5, 4, (4, 3), (1, 1), {}),
    "one pixel, strided": Layer(2, 3, 20, (5, 4), (1, 1), {"stride": (2, 3)}),
    "depthwise": Layer(2, 6, 6, (5, 4), (3, 3), {"padding": 1, "groups": 6}),
    "large window": Layer(2, 2, 3, (3, 2), (7, 5), {"padding": (3, 2)}),
}
"""By what is special about each."""

POOLINGS: dict[str, dict[str, Any]] = {
    "2": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2},
    "gaps": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    "dilation": {"kernel_size": 2, "stride": 1, "dilation": (2, 3)},
    "ceil_mode": {"kernel_size": (2, 3), "ceil_mode": True},
    "ceil_mode, overlapping": {
        "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "ceil_mode": True,
    },
    "no rest": {"kernel_size": (1, 4), "stride": (1, 3)},
    "one unit": {"kernel_size": 1},
    "one unit, strided": {"kernel_size": 1, "stride": 2},
}  # fmt: skip
"""Arguments of a max pooling, for maps of 7 rows and 8 columns or about that."""

ORDERS = (torch.contiguous_format, torch.channels_last)
"""Orders of maps in memory."""


@dataclass
class Drawn:
    """The tensors of a convolution, with its error kernel."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    signal: Tensor
    feedback: Tensor


def values(seed: int, *sizes: tuple[int, ...], grid: bool = False) -> list[np.ndarray]:
    """Normal values; or multiples of 1/4 up to 1, whose sums of products are exact in every dtype."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-4, 5, s) / 4 if grid else rng.standard_normal(s) for s in sizes]


def draw(
    layer: Layer, dtype: torch.dtype, device: str, *, seed: int = 0, grid: bool = False
) -> Drawn:
    """Everything of one layer, from a seed."""
    tied, outputs = layer.tied_shape, layer.outputs
    sizes = (
        (layer.batch, layer.inputs, *layer.size), tied, (outputs,),
        (layer.batch, outputs, *layer.positions()), tied,
    )  # fmt: skip
    drawn = (torch.from_numpy(v).to(device, dtype) for v in values(seed, *sizes, grid=grid))
    return Drawn(*drawn)


def pooled(pool: dict[str, Any] | None) -> MaxPool | None:
    """The library's form of a pooling."""
    return None if pool is None else MaxPool(**pool)
