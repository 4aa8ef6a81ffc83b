"""Layers whose error travels down through weights of its own, R, instead of the forward weights W.

::

    forward      z = W x + b                      as the ordinary layer
    backward     ∂x = Rᵀ ∂z,   ∂W = ∂z xᵀ         as backpropagation, but for R in the place of W
    "updated"    R gets the same gradient as W    URFB (Amit 2019)
    "fixed"      R never changes                  FRFB, feedback alignment (Lillicrap et al. 2016)
    "sign"       |R| ⊙ sign(W) in R's place       sign symmetry

R lies in W's layout, in the buffer `feedback`. It is no parameter of the model, but learns like one: hand
the R of all layers to the optimizer, which also clears their gradients::

    optimizer = torch.optim.SGD([*model.parameters(), *bpfree.nn.feedback_weights(model)], lr=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()                         # model.zero_grad() would leave R's gradients

Without weight decay W − R then stays what it was, wherever both connections exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.nn.parameter import UninitializedParameter, is_lazy

from bpfree.nn._feedback_layer import FeedbackLayer, Place
from bpfree.nn._locally_connected import spread
from bpfree.nn.local import LocallyConnected2d
from bpfree_kernels.geometry import pair, split_padding
from bpfree_kernels.ops.local_conv import Ints


def _linear_down(signal: Tensor, feedback: Tensor, shape: torch.Size, place: Place) -> Tensor:
    return signal @ feedback


def _conv_down(signal: Tensor, feedback: Tensor, shape: torch.Size, place: Place) -> Tensor:
    return cast(Tensor, conv2d_input(shape, feedback, signal, *place))


def _local_down(signal: Tensor, feedback: Tensor, shape: torch.Size, place: Place) -> Tensor:
    # The op beneath local_conv_feedback: the forward pass has checked everything, and torch.compile
    # traces no checks in a backward pass.
    down = torch.ops.bpfree.local_conv_input_grad
    return cast(Tensor, down(signal, feedback, *shape[2:], *place, None))


class FeedbackLinear(FeedbackLayer, nn.Linear):
    """`torch.nn.Linear` whose input gradient goes through R (see `bpfree.nn.feedback`).

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear` has them.
        mode: what becomes of R: ``"updated"``, ``"fixed"`` or ``"sign"``.
        weight_mask: bool, [out, in]: which forward connections exist. The others are 0 and do not learn.
        feedback_mask: the same of R.

    Attributes:
        weight: W, [out, in].
        feedback: R, [out, in], a buffer. Write to it in place (``feedback.data.copy_``).
        weight_mask, feedback_mask: buffers, ``None`` if every connection exists.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: an unknown mode, or a mask of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "updated",
        weight_mask: Tensor | None = None,
        feedback_mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_feedback(mode, weight_mask, feedback_mask)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, [..., in] -> [..., out]."""
        z = F.linear(x.detach(), self._learning_weight(), self.bias)
        return self.send_down(z, x, _linear_down, ())


class FeedbackConv2d(FeedbackLayer, nn.Conv2d):
    """`torch.nn.Conv2d` whose input gradient goes through R (see `bpfree.nn.feedback`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as `torch.nn.Conv2d` has them.
        mode, weight_mask, feedback_mask: as `FeedbackLinear` has them.

    Attributes:
        weight: W, [out, in/groups, kernel_h, kernel_w].
        feedback: R, shaped like W, a buffer.
        weight_mask, feedback_mask: buffers, ``None`` if every connection exists.

    Raises:
        TypeError, ValueError: as `FeedbackLinear` and `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "updated",
        weight_mask: Tensor | None = None,
        feedback_mask: Tensor | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": bias,
            "padding_mode": padding_mode,
        }
        super().__init__(
            in_channels, out_channels, cast(Any, kernel_size), **options, device=device, dtype=dtype
        )
        self.add_feedback(mode, weight_mask, feedback_mask)

    def forward(self, x: Tensor) -> Tensor:
        """W ∗ x + b, [batch, in, height, width] (or without the batch) as `torch.nn.Conv2d`."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding: Any = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            x, padding = self._pad(x), (0, 0)
        place = (self.stride, padding, self.dilation, self.groups)
        z = F.conv2d(x.detach(), self._learning_weight(), self.bias, *place)
        return self.send_down(z, x, _conv_down, place)

    def _pad(self, x: Tensor) -> Tensor:
        """Pad beforehand where the convolution cannot: unevenly, or with other values than 0."""
        kernel, apart, steps = (
            pair(name, getattr(self, name), 1) for name in ("kernel_size", "dilation", "stride")
        )
        above, across = split_padding(self.padding, kernel, apart, steps)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (*across, *above), mode=mode)


class FeedbackLocallyConnected2d(FeedbackLayer, LocallyConnected2d):
    """`LocallyConnected2d` whose input gradient goes through R (see `bpfree.nn.feedback`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, input_size,
            device, dtype: as `LocallyConnected2d` has them.
        mode, weight_mask, feedback_mask: as `FeedbackLinear` has them; masks need `input_size`.

    Attributes:
        weight: W, [rows, columns, kernel_h, kernel_w, in/groups, out].
        feedback: R, shaped like W, a buffer.
        weight_mask, feedback_mask: buffers, ``None`` if every connection exists.

    Raises:
        TypeError, ValueError: as `FeedbackLinear` and `LocallyConnected2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        input_size: Ints | None = None,
        mode: str = "updated",
        weight_mask: Tensor | None = None,
        feedback_mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if input_size is None and (weight_mask is not None or feedback_mask is not None):
            raise ValueError("masks need input_size, which says how many positions they cover.")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            input_size=input_size, device=device, dtype=dtype,
        )  # fmt: skip
        self.add_feedback(mode, weight_mask, feedback_mask)

    def _materialize(self, shape: tuple[int, ...]) -> None:
        super()._materialize(shape)
        if is_lazy(cast(Tensor, self._buffers.get("feedback"))):
            cast(UninitializedParameter, self.feedback).materialize(shape)

    def _draw_glorot(self) -> None:
        window = math.prod(self.kernel_size)
        fans = window * (self.in_channels // self.groups + self.out_channels)
        nn.init.uniform_(self.feedback, -math.sqrt(6 / fans), math.sqrt(6 / fans))

    def _convolve(self, x: Tensor) -> Tensor:
        z = super()._convolve(x.detach())
        return self.send_down(z, x, _local_down, self._geometry)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, input_size: Ints) -> Self:
        """Untie a `FeedbackConv2d`: R and the masks are copied to every position as W is.

        Args:
            conv: the convolution; nothing of it is shared.
            input_size: (height, width) of its input.

        Raises:
            TypeError: a convolution without feedback.
            ValueError: as `LocallyConnected2d.from_conv2d`, or feedback that learns at a pace of its own.
        """
        if not isinstance(conv, FeedbackConv2d):
            raise TypeError(f"conv must be a FeedbackConv2d, got {type(conv).__name__}.")
        if conv.feedback_scale != 1:
            raise ValueError(
                "conv must have feedback that gets the gradient of its weight, "
                f"got {conv.feedback_scale:g} times that gradient."
            )
        layer = cls._from_tied(conv, input_size, mode=conv.mode)
        positions = layer.weight.shape[:2]
        layer.hold_feedback(spread(conv.feedback, positions))
        if conv.weight_mask is not None:
            layer.weight_mask = spread(conv.weight_mask, positions)
        if conv.feedback_mask is not None:
            layer.feedback_mask = spread(conv.feedback_mask, positions)
        return layer


def feedback_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """What learns beside the weights, for the optimizer, in the order of the modules.

    That is R of every layer in mode ``"updated"``, and E of every `ErrorKernelLinear` and
    `ErrorKernelConv2d`.
    """
    for module in model.modules():
        if isinstance(module, FeedbackLayer) and module.mode == "updated":
            yield cast(nn.Parameter, module.feedback)
