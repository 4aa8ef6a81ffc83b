"""Layers with an inverse: as many outputs as they see inputs, of which some are handed on (GAIT-prop).

The first outputs of a layer go to the next one. The others, the *auxiliary* units, are there so that the
outputs tell the input: a convolution has as many at every position as its window has values. Their
pre-activations are kept, and used on the way back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree_kernels.geometry import Pair, pair, same_margins, split_padding

Ints = int | Sequence[int]


class Invertible(nn.Module):
    """What `InvertibleLinear` and `InvertibleConv2d` share.

    Attributes:
        outputs: how many of the outputs, the first ones, are handed on.
        auxiliary: pre-activations of the others, as the last `forward` left them, detached; ``None``
            where there are none. A view, which keeps the whole z alive. Not in the ``state_dict``.
    """

    weight: Tensor
    bias: Tensor | None

    def _start(self, name: str, outputs: int | None) -> None:
        """What the constructor adds; `name` is that of the argument."""
        count = self.weight.shape[0]
        self.outputs = count if outputs is None else check_count(name, outputs, count)
        self.auxiliary: Tensor | None = None
        self._inverse: Tensor | None = None

    def reset_parameters(self) -> None:
        """Draw an orthogonal weight, seen as [out, values of a window], and set the bias to 0."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def first(self, outputs: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first outputs: the parameters, or views of them."""
        if outputs == self.weight.shape[0]:
            return self.weight, self.bias
        return self.weight[:outputs], None if self.bias is None else self.bias[:outputs]

    @abstractmethod
    def field(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """Pre-activations of the first `outputs`; of all outputs by default. Keeps nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations that are handed on; the others are kept (`auxiliary`)."""
        z = self.field(x)
        if self.outputs == self.weight.shape[0]:
            self.auxiliary = None
            return z
        channels = -1 if self.weight.dim() == 2 else -3
        missing = self.weight.shape[0] - self.outputs
        self.auxiliary = z.narrow(channels, self.outputs, missing).detach()
        return z.narrow(channels, 0, self.outputs)

    def _whole(self, y: Tensor, channels: int) -> Tensor:
        """The outputs handed on and the auxiliary ones together.

        Raises:
            RuntimeError: no forward pass left auxiliary units.
            ValueError: outputs of another shape or kind than the last forward pass had.
        """
        missing = self.weight.shape[0] - self.outputs
        if y.dim() < -channels or y.shape[channels] != self.outputs:
            raise ValueError(
                f"y must have the {self.outputs} outputs of {self} that are handed on, got shape "
                f"{tuple(y.shape)}."
            )
        if missing == 0:
            return y
        kept = self.auxiliary
        if kept is None:
            raise RuntimeError(
                f"inverse of {self} needs the auxiliary units of a forward pass before."
            )
        wanted = [*kept.shape]
        wanted[channels] = self.outputs
        if [*y.shape] != wanted or (y.dtype, y.device) != (kept.dtype, kept.device):
            raise ValueError(
                f"y must be like the last forward pass of {self}, {tuple(wanted)} of {kept.dtype} on "
                f"{kept.device}, got {tuple(y.shape)} of {y.dtype} on {y.device}."
            )
        return torch.cat([y, kept], channels)

    def _inverse_weight(self) -> Tensor:
        """W⁻ᵀ, refined from the last one: nothing tells for sure whether the weight has changed."""
        start = None if self._inverse is None else self._inverse.to(self.weight)
        self._inverse = kernels.invert(self.weight, start).value
        return self._inverse

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be had again: a copy shall not take another's weight for its own."""
        return self.__dict__ | {"_inverse": None, "auxiliary": None}


class InvertibleLinear(Invertible, nn.Linear):  # type: ignore[misc]  # torch leaves bias untyped
    """A square `torch.nn.Linear` that begins orthogonal and has an inverse.

    ::

        layer = bpfree.nn.InvertibleLinear(1024, outputs=10)
        z = layer(x)              # [..., 1024] -> [..., 10]
        x = layer.inverse(z)      # with the 1014 auxiliary units that forward has kept

    Args:
        features: inputs, and all outputs.
        bias: whether there is one.
        outputs: how many outputs are handed on; all of them by default. `InvertibleConv2d` calls it
            `features`, which here are those that enter; the attribute is `outputs` in both.
        device, dtype: of the parameters. The inverse needs float32 or float64.

    Attributes:
        weight: [features, features].
        bias: [features], or ``None``.

    Raises:
        TypeError, ValueError: `outputs` that are no number from 1 to `features`.
    """

    def __init__(
        self,
        features: int,
        bias: bool = True,
        *,
        outputs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__(features, features, bias, device, dtype)
        self._start("outputs", outputs)

    def field(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """z = W x + b of the first `outputs`; of all outputs by default. Keeps nothing."""
        return F.linear(x, *self.first(self.out_features if outputs is None else outputs))

    @torch.no_grad()
    def inverse(self, y: Tensor, x: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The input from the outputs, x = W⁻¹ (z − b), without gradients.

        Args:
            y: z of the outputs that are handed on, before any activation, [..., outputs]; the others
                are `auxiliary`, from the last forward pass.
            x: not read; here so that both kinds of layer are called alike.

        Returns:
            The input, [..., features].

        Raises:
            RuntimeError: there are auxiliary units, but there was no forward pass.
            TypeError: a weight that is neither float32 nor float64.
            ValueError: another shape, dtype or device than the last forward pass had.
            torch.linalg.LinAlgError: the weight is singular, or nearly so.
        """
        z = self._whole(y, -1)
        return F.linear(z if self.bias is None else z - self.bias, self._inverse_weight().t())

    def extra_repr(self) -> str:
        """The arguments."""
        return f"features={self.in_features}, outputs={self.outputs}, bias={self.bias is not None}"


class InvertibleConv2d(Invertible, nn.Conv2d):
    """A `torch.nn.Conv2d` with an output for every value of its window; begins orthogonal, has an inverse.

    ::

        layer = bpfree.nn.InvertibleConv2d(3, 5, stride=2, padding="same", features=16)
        z = layer(x)              # [batch, 3, 32, 32] -> [batch, 16, 16, 16], of 75 channels
        x = layer.inverse(z, x)   # with the 59 auxiliary channels that forward has kept

    Args:
        in_channels: channels that enter. All outputs are in_channels · kernel_h · kernel_w.
        kernel_size, stride, dilation: as `torch.nn.Conv2d` has them.
        padding: an int, a pair, ``"valid"``, or ``"same"`` at any stride as TensorFlow has it:
            ⌈size / stride⌉ positions, what is odd below and on the right.
        features: how many channels are handed on (the attribute `outputs`); all of them by default.
        bias: whether there is one.
        device, dtype: of the parameters. The inverse needs float32 or float64.

    Attributes:
        weight: [in · kernel_h · kernel_w, in, kernel_h, kernel_w].
        bias: [in · kernel_h · kernel_w], or ``None``.

    Raises:
        TypeError: arguments that are no ints.
        ValueError: values that are not possible.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        features: int | None = None,
        bias: bool = True,
        dilation: Ints = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        kernel, steps = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        apart = pair("dilation", dilation, 1)
        margins: Any = padding if isinstance(padding, str) else pair("padding", padding, 0)
        super().__init__(
            in_channels, in_channels * kernel[0] * kernel[1], kernel, steps,
            0 if margins == "same" else margins, apart, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.padding = margins  # torch's own "same" takes no stride
        self._start("features", features)

    def margins(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros around an input of a size (height, width): ((above, below), (left, right))."""
        kernel, apart = cast(Pair, self.kernel_size), cast(Pair, self.dilation)
        if self.padding == "same":
            return same_margins(size, kernel, self.stride, apart)
        return split_padding(self.padding, kernel, apart, cast(Pair, self.stride))

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, and the padding that torch's convolution has to add to it (height, width)."""
        (above, below), (left, right) = self.margins((x.shape[-2], x.shape[-1]))
        if (above, left) == (below, right):
            return x, (above, left)
        return F.pad(x, (left, right, above, below)), (0, 0)

    def field(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """z = W ∗ x + b of the first `outputs`; of all outputs by default. Keeps nothing."""
        weight, bias = self.first(self.out_channels if outputs is None else outputs)
        x, padding = self.pad(x)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)

    @torch.no_grad()
    def inverse(self, y: Tensor, x: Tensor) -> Tensor:
        """The input from the outputs, by `bpfree_kernels.invertible_conv_reconstruct`, without gradients.

        Args:
            y: z of the channels that are handed on, before any activation, [batch, outputs, out_height,
                out_width]; the others are `auxiliary`, from the last forward pass.
            x: input of that pass, [batch, in, height, width]: what overlapping windows bring too often is
                taken off it, and what no window holds comes from it.

        Returns:
            The input, [batch, in, height, width].

        Raises:
            RuntimeError: there are auxiliary units, but there was no forward pass.
            TypeError: a weight that is neither float32 nor float64, or dtypes that differ.
            ValueError: another shape, dtype or device than the last forward pass had.
            torch.linalg.LinAlgError: the weight is singular, or nearly so.
        """
        z = self._whole(y, -3)
        return kernels.invertible_conv_reconstruct(
            z, x, self._inverse_weight(), self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, activation="identity",
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments."""
        arguments: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{arguments}, features={self.outputs}"


def check_count(name: str, outputs: int, every: int) -> int:
    """A number of outputs from 1 to all of them.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(outputs, int) or isinstance(outputs, bool):
        raise TypeError(f"{name} must be an int, got {outputs!r}.")
    if not 1 <= outputs <= every:
        raise ValueError(
            f"{name} must lie in 1 to {every}, the outputs of the layer, got {outputs}."
        )
    return outputs
