"""The products of a layer, whatever its kind, for rules that carry a signal down layer by layer.

::

    forward    z = W x + b, y = f(z)
    feedback   Rᵀ δ, with any weights R that lie like W
    gradients  ∂W = scale · Σ_batch δ xᵀ, ∂b = scale · Σ_batch δ   (over space, too, where W is shared)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypedDict, cast

from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.convolution import Convolution, channels_last
from bpfree.nn import LocallyConnected2d
from bpfree.stages import Stage

Gradients = tuple[Tensor, Tensor | None]
"""Of weight and bias."""


class Products(ABC):
    """Of one layer; made by `products`."""

    def __init__(self, stage: Stage, backend: str | None) -> None:
        """Take a stage, and the backend of the ops."""
        self.stage = stage
        self.backend = backend

    def enter(self, x: Tensor) -> Tensor:
        """The layer's input as the other methods want it."""
        return x

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and f(z) of an input (`enter`)."""

    @abstractmethod
    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Carry a signal at z down through weights that lie like the layer's own.

        Args:
            signal: δ, shaped like z.
            weight: R.
            x: input (`enter`); only its size is read.

        Returns:
            Signal at the input before `enter`.
        """

    @abstractmethod
    def gradients(self, signal: Tensor, x: Tensor, scale: float) -> Gradients:
        """Gradients of weight and bias, for an input (`enter`)."""


class _Dense(Products):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stage
        return kernels.dense_forward(
            x, stage.layer.weight, stage.layer.bias,
            activation=stage.activation, slope=stage.slope, backend=self.backend,
        )  # fmt: skip

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return signal @ weight

    def gradients(self, signal: Tensor, x: Tensor, scale: float) -> Gradients:
        layer = self.stage.layer
        return kernels.dense_grad(
            signal, x, layer.weight, layer.bias, scale=scale, backend=self.backend
        )


class _Shared(Products):
    """A convolution."""

    def __init__(self, stage: Stage, backend: str | None, layer: nn.Conv2d) -> None:
        super().__init__(stage, backend)
        self._convolution = Convolution(layer)

    def enter(self, x: Tensor) -> Tensor:
        return self._convolution.pad(channels_last(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self._convolution.forward(x)
        return z, self.stage.activate(z)

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self._convolution.feedback(signal, weight, x)

    def gradients(self, signal: Tensor, x: Tensor, scale: float) -> Gradients:
        has_bias = self.stage.layer.bias is not None
        of_weight, of_bias = self._convolution.gradients(x, signal, weight=True, bias=has_bias)
        scaled = cast(Tensor, of_weight).mul_(scale)
        return scaled, None if of_bias is None else of_bias.mul_(scale)


class _Place(TypedDict):
    """How the windows of a locally connected layer lie, as the ops take it."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int


def place_of(layer: LocallyConnected2d) -> _Place:
    """How the windows of a locally connected layer lie, as the ops take it."""
    return _Place(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )


class _Untied(Products):
    """A locally connected layer."""

    def __init__(self, stage: Stage, backend: str | None, layer: LocallyConnected2d) -> None:
        super().__init__(stage, backend)
        self._place = place_of(layer)

    def enter(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stage
        return kernels.local_conv_forward(
            x, stage.layer.weight, stage.layer.bias, **self._place,
            activation=stage.activation, slope=stage.slope, backend=self.backend,
        )  # fmt: skip

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return kernels.local_conv_feedback(
            signal, weight, x.shape[2:], **self._place, backend=self.backend
        )

    def gradients(self, signal: Tensor, x: Tensor, scale: float) -> Gradients:
        layer = self.stage.layer
        return kernels.local_conv_grad(
            signal, x, layer.weight, layer.bias, scale=scale, **self._place, backend=self.backend
        )


def products(stage: Stage, backend: str | None) -> Products:
    """The products of a stage's layer."""
    layer = stage.layer
    if isinstance(layer, nn.Conv2d):
        return _Shared(stage, backend, layer)
    if isinstance(layer, LocallyConnected2d):
        return _Untied(stage, backend, layer)
    return _Dense(stage, backend)
