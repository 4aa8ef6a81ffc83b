"""Invertible convolutions of every geometry, with tensors for them, and their formulas in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .golden_invertible import Windows, both, inverse_of
from .square_weights import near_orthogonal


@dataclass(frozen=True)
class Layer:
    """A geometry, and how many samples and channels go through it.

    Attributes:
        batch, inputs: numbers of samples and of channels below.
        size, kernel: height and width of the map and of the window.
        place: stride, padding and dilation, where they are not torch's defaults.
    """

    batch: int
    inputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    place: dict[str, Any]

    @property
    def windows(self) -> Windows:
        """How the windows lie."""
        return Windows(self.size, self.kernel, **self.place)

    @property
    def outputs(self) -> int:
        """As many as a window has values."""
        return self.inputs * self.kernel[0] * self.kernel[1]

    def with_batch(self, batch: int) -> Layer:
        """The same geometry for another number of samples."""
        return replace(self, batch=batch)


LAYERS = {
    "one value": Layer(1, 1, (1, 1), (1, 1), {}),
    "dense": Layer(7, 17, (1, 1), (1, 1), {}),
    "one pixel, strided": Layer(2, 3, (5, 4), (1, 1), {"stride": (2, 3)}),
    "one position": Layer(5, 3, (3, 2), (3, 2), {"padding": "valid"}),
    "k3 s1": Layer(3, 2, (5, 6), (3, 3), {"padding": 1}),
    "k3 s1, no padding": Layer(2, 2, (5, 4), (3, 3), {}),
    "k3 s2": Layer(2, 2, (7, 5), (3, 3), {"stride": 2, "padding": 1}),
    "k3 s2, same": Layer(2, 2, (7, 6), (3, 3), {"stride": 2, "padding": "same"}),
    "k5 s2": Layer(2, 1, (9, 8), (5, 5), {"stride": 2, "padding": 2}),
    "k5 s2, same": Layer(2, 1, (8, 9), (5, 5), {"stride": 2, "padding": "same"}),
    "k2 s3": Layer(2, 3, (8, 7), (2, 2), {"stride": 3}),
    "k2 s3, same": Layer(2, 3, (7, 8), (2, 2), {"stride": 3, "padding": "same"}),
    "same, even window": Layer(2, 1, (5, 4), (2, 4), {"padding": "same"}),
    "same, dilated": Layer(
        2, 1, (7, 6), (3, 2), {"stride": (2, 1), "padding": "same", "dilation": (2, 3)}
    ),
    "dilation": Layer(2, 2, (7, 6), (3, 2), {"padding": (1, 0), "dilation": (2, 3)}),
    "larger than the map": Layer(2, 1, (2, 3), (5, 4), {"padding": 2}),
    "one row": Layer(7, 3, (1, 9), (1, 3), {"stride": (1, 2), "padding": (0, 1)}),
    "five channels": Layer(2, 5, (4, 5), (3, 3), {"padding": "same"}),
    "many channels": Layer(2, 17, (4, 3), (2, 2), {}),
    "many samples": Layer(70, 1, (3, 3), (2, 2), {}),
    "everything": Layer(
        3, 2, (9, 8), (3, 2), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1)}
    ),
}  # fmt: skip
"""By what is special about each."""


@dataclass
class Drawn:
    """The tensors of a layer; `inverse` is that of `weight`."""

    x: Tensor
    weight: Tensor
    inverse: Tensor
    bias: Tensor
    output: Tensor
    target: Tensor
    rate: Tensor


def draw(
    layer: Layer, dtype: torch.dtype, device: str, *, seed: int = 0, noise: float = 0.5
) -> Drawn:
    """Everything of one layer, from a seed; `noise` as in `near_orthogonal`."""
    rng = np.random.default_rng(seed)
    weight = near_orthogonal(rng, layer.outputs, noise)
    weight = weight.reshape(layer.outputs, layer.inputs, *layer.kernel)
    above = (layer.batch, layer.outputs, *layer.windows.positions)
    values = (
        rng.standard_normal((layer.batch, layer.inputs, *layer.size)), weight, inverse_of(weight),
        rng.standard_normal(layer.outputs), rng.standard_normal(above), rng.standard_normal(above),
        rng.random(layer.batch),
    )  # fmt: skip
    return Drawn(*(torch.from_numpy(value).to(device, dtype).contiguous() for value in values))


def plain_forward(x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """W ∗ x, differentiable."""
    (above, below), (left, right) = windows.margins
    padded = F.pad(x, (left, right, above, below))
    return F.conv2d(
        padded, weight, stride=both(windows.stride), dilation=both(windows.dilation)
    )  # fmt: skip


def plain_carried_down(signal: Tensor, kernel: Tensor, windows: Windows) -> Tensor:
    """What autograd carries down a convolution from its output's gradient."""
    x = signal.new_zeros(len(signal), kernel.shape[1], *windows.size, requires_grad=True)
    return torch.autograd.grad(plain_forward(x, kernel, windows), x, signal)[0]


def plain_reconstruct(
    output: Tensor, x: Tensor, inverse: Tensor, bias: Tensor | None, target: Tensor | None,
    rate: Tensor | None, windows: Windows, slope: float,
) -> Tensor:  # fmt: skip
    """x̂ of a leaky ReLU; of the identity with ``slope=1``."""
    u = output
    if target is not None and rate is not None:
        gain = torch.ones_like(output).where(output > 0, slope**2)
        u = torch.lerp(output, target, gain * rate[:, None, None, None])
    z = F.leaky_relu(u, 1 / slope)
    z = z if bias is None else z - bias[:, None, None]
    times = torch.from_numpy(windows.times()).to(x)
    return plain_carried_down(z, inverse, windows) - (times - 1) * x
