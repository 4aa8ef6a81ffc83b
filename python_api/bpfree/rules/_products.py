"""The products of a layer, whatever its kind, for rules that carry a signal down layer by layer.

::

    forward    z = W x + b, y = f(z)
    feedback   Rᵀ δ, with any weights R that lie like W
    gradients  ∂W = scale · Σ_batch δ xᵀ, ∂b = scale · Σ_batch δ   (over space, too, where W is shared)
    step       the gradients applied to W, b and, if one learns beside them, R

Of an invertible layer the auxiliary outputs are left out: z, y and δ have those that are handed on, and the
others' part of a gradient is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.convolution import Convolution, channels_last
from bpfree.nn import InvertibleConv2d, LocallyConnected2d
from bpfree.stages import Stage
from bpfree_kernels.backends import bodies_of
from bpfree_kernels.update import UpdateRule

Gradients = tuple[Tensor, Tensor | None]
"""Of weight and bias."""


class Windows(TypedDict, total=False):
    """How the windows of a layer lie, as the ops take it; empty for a dense layer."""

    stride: Any
    padding: Any
    dilation: Any


class Place(Windows, total=False):
    """The same, and into how many groups the channels fall."""

    groups: int


def windows_of(layer: nn.Module) -> Windows:
    """How the windows of a layer lie."""
    if not isinstance(layer, nn.Conv2d | LocallyConnected2d):
        return Windows()
    return Windows(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


def place_of(layer: nn.Module) -> Place:
    """How the windows of a layer lie, and its groups."""
    if not isinstance(layer, nn.Conv2d | LocallyConnected2d):
        return Place()
    return Place(**windows_of(layer), groups=layer.groups)


class Products(ABC):
    """Of one layer; made by `products`."""

    grad_op: ClassVar[Callable[..., Gradients]]
    step_op: ClassVar[Callable[..., None]]

    def __init__(self, stage: Stage, backend: str | None) -> None:
        """Take a stage, and the backend of the ops."""
        self.stage = stage
        self.backend = backend
        self._place = place_of(stage.layer)

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

    def gradients(
        self, signal: Tensor, x: Tensor, scale: float, *, add_to: Tensor | None = None
    ) -> Gradients:
        """Gradients of weight and bias, for an input (`enter`).

        Args:
            signal: δ, shaped like z.
            x: input (`enter`).
            scale: factor of the gradients.
            add_to: gradient of the weight that this one is added to; the bias then has none.
        """
        layer = self.stage.layer
        x, place = self._placed(x)
        if self.stage.has_auxiliary:
            return self._gradients_of_first(signal, x, scale, place)
        if add_to is not None:
            bias, to, adds = None, add_to, True
        else:
            # torch's fused optimizers take a gradient element by element, as its parameter lies.
            bias, to, adds = layer.bias, torch.empty_like(layer.weight), False
        return type(self).grad_op(
            signal, x, layer.weight, bias, scale=scale, grad_weight=to, accumulate=adds,
            **place, backend=self.backend,
        )  # fmt: skip

    def _gradients_of_first(
        self, signal: Tensor, x: Tensor, scale: float, place: Place
    ) -> Gradients:
        """Gradients that are 0 for the auxiliary outputs."""
        layer, outputs = self.stage.layer, self.stage.outputs
        of_weight = torch.zeros_like(layer.weight)
        of_bias = None if layer.bias is None else torch.zeros_like(layer.bias)
        type(self).grad_op(
            signal, x, *self.stage.first(), scale=scale, grad_weight=of_weight[:outputs],
            grad_bias=None if of_bias is None else of_bias[:outputs], **place, backend=self.backend,
        )  # fmt: skip
        return of_weight, of_bias

    def step(
        self,
        signal: Tensor,
        x: Tensor,
        update: UpdateRule,
        state: kernels.LayerState,
        *,
        scale: float,
        **feedback: Any,
    ) -> None:
        """Apply the gradients in one op.

        Args:
            signal, x, scale: as in `gradients`.
            update: the update rule.
            state: what it remembers of weight and bias.
            feedback: the op's own arguments about a weight that learns beside the layer's.
        """
        layer = self.stage.layer
        x, place = self._placed(x)
        if self.stage.has_auxiliary:  # whose weights may decay, too
            missing = layer.weight.shape[0] - self.stage.outputs
            signal = F.pad(signal, (0, 0) * (signal.dim() - 2) + (0, missing))
        type(self).step_op(
            signal, x, layer.weight, layer.bias, update, state,
            scale=scale, **feedback, **place, backend=self.backend,
        )  # fmt: skip

    def _placed(self, x: Tensor) -> tuple[Tensor, Place]:
        """The input (`enter`), and how the windows lie on it, as the ops take them."""
        return x, self._place


class _Dense(Products):
    grad_op = kernels.dense_grad
    step_op = kernels.dense_step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stage
        return kernels.dense_forward(
            x, *stage.first(), activation=stage.activation, slope=stage.slope, backend=self.backend
        )

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return signal @ weight[: self.stage.outputs]


class ConvolutionProducts(Products):
    """Of a convolution, whose forward and feedback are torch's own."""

    grad_op = kernels.conv_grad
    step_op = kernels.conv_step

    def __init__(self, stage: Stage, backend: str | None) -> None:
        super().__init__(stage, backend)
        self._convolution = Convolution(cast(nn.Conv2d, stage.layer))

    def enter(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.field(x)
        return z, self.stage.activate(z)

    def field(self, x: Tensor) -> Tensor:
        """z of an input (`enter`)."""
        return self._convolution.forward(self._convolution.pad(x))

    def linear(self, x: Tensor) -> Tensor:
        """W ∗ x without the bias, how z changes if the input (`enter`) does by x."""
        return self._convolution.linear(self._convolution.pad(x))

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self._convolution.feedback(signal, weight, self._convolution.pad(x))


class _InvertibleConvolution(Products):
    """Of a convolution with auxiliary outputs, and TensorFlow's "same" at any stride."""

    grad_op = kernels.conv_grad
    step_op = kernels.conv_step

    def __init__(self, stage: Stage, backend: str | None) -> None:
        super().__init__(stage, backend)
        known = bodies_of("invertible_conv_error")
        if backend not in (None, *known):
            raise ValueError(
                f"backend must be one of {', '.join(known)} for the InvertibleConv2d {stage.name!r}, got "
                f"{backend!r}."
            )

    def enter(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = cast(InvertibleConv2d, self.stage.layer).field(x, self.stage.outputs)
        return z, self.stage.activate(z)

    def feedback(self, signal: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return kernels.invertible_conv_error(
            signal, weight[: self.stage.outputs], x.shape[2:],
            **windows_of(self.stage.layer), backend=self.backend,
        )  # fmt: skip

    def _placed(self, x: Tensor) -> tuple[Tensor, Place]:
        x, padding = cast(InvertibleConv2d, self.stage.layer).pad(x)
        return x, self._place | Place(padding=padding)


class _Untied(Products):
    """A locally connected layer."""

    grad_op = kernels.local_conv_grad
    step_op = kernels.local_conv_step

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


def products(stage: Stage, backend: str | None) -> Products:
    """The products of a stage's layer."""
    if isinstance(stage.layer, InvertibleConv2d):
        return _InvertibleConvolution(stage, backend)
    if isinstance(stage.layer, nn.Conv2d):
        return ConvolutionProducts(stage, backend)
    if isinstance(stage.layer, LocallyConnected2d):
        return _Untied(stage, backend)
    return _Dense(stage, backend)


def convolutions(stages: Iterable[Stage], backend: str | None) -> dict[str, ConvolutionProducts]:
    """The products of the convolutions among some stages, by the name of their layer."""
    return {
        s.name: ConvolutionProducts(s, backend) for s in stages if isinstance(s.layer, nn.Conv2d)
    }
