"""What locally connected layers of one and two dimensions share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from bpfree.nn.connectivity import clear_outside, own_mask
from bpfree_kernels import checks
from bpfree_kernels.geometry import geometry, output_size, pair
from bpfree_kernels.ops.local_conv import Ints


def spread(kernel: Tensor, positions: Sequence[int]) -> Tensor:
    """Give every position a copy of one convolution kernel.

    Args:
        kernel: [out, in/groups, \\*window], as torch's convolutions have it.
        positions: size of the output, (rows, columns) or (columns,).

    Returns:
        [\\*positions, \\*window, in/groups, out], memory of its own.
    """
    inner = kernel.detach().permute(*range(2, kernel.dim()), 1, 0)
    return inner.expand(*positions, *inner.shape).clone(memory_format=torch.contiguous_format)


class LocallyConnected(LazyModuleMixin, nn.Module):
    """A convolution whose weights differ from place to place, over `_dims` dimensions.

    Inside, a sequence is a map of height 1.
    """

    _dims: ClassVar[int]
    cls_to_become = None  # a layer that has waited for its first batch stays what it is

    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    input_size: tuple[int, ...] | None

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
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self._ints("kernel_size", kernel_size, 1)
        self.stride = self._ints("stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else self._ints("padding", padding, 0)
        self.dilation = self._ints("dilation", dilation, 1)
        self.groups = groups
        pads = self.padding
        self._place: dict[str, Any] = {
            "stride": self._pair(self.stride, 1),
            "padding": pads if isinstance(pads, str) else self._pair(pads, 0),
            "dilation": self._pair(self.dilation, 1),
        }
        self._geometry = geometry(self._pair(self.kernel_size, 1), **self._place, groups=groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int):
                raise TypeError(f"{name} must be an int, got {channels!r}.")
            if channels < 1 or channels % groups != 0:
                raise ValueError(
                    f"{name} must be a positive multiple of groups, {groups}, got {channels}."
                )
        if mask is not None and input_size is None:
            raise ValueError("mask needs input_size, which says how many positions it covers.")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = cast(nn.Parameter, UninitializedParameter(**kind))
        self.register_parameter("bias", cast(Any, UninitializedParameter(**kind)) if bias else None)
        self.register_buffer("mask", None)
        self.input_size = None
        if input_size is not None:
            self._wait_no_more()
            self._set_input_size(self._ints("input_size", input_size, 1))
            self.mask = own_mask("mask", mask, self.weight)
            clear_outside(self.weight, self.mask)

    @classmethod
    def _ints(cls, name: str, value: Ints, least: int) -> tuple[int, ...]:
        """An argument as one int for each dimension, none below `least`."""
        if cls._dims == 1 and isinstance(value, Sequence):
            if len(value) != 1:
                raise ValueError(f"{name} must be an int or one int in a tuple, got {value!r}.")
            value = value[0]
        return pair(name, value, least)[-cls._dims :]

    @classmethod
    def _pair(cls, values: Sequence[int], across: int) -> tuple[int, int]:
        """One int for each dimension as (height, width)."""
        height, width = (across, *values)[-2:]
        return height, width

    def _positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the output for an input of some size."""
        kernel = self._pair(self.kernel_size, 1)
        return output_size(self._pair(size, 1), kernel, **self._place)[-self._dims :]

    def _wait_no_more(self) -> None:
        """Take back the hooks that make the parameters at the first batch."""
        self._initialize_hook.remove()
        self._load_hook.remove()
        del self._initialize_hook, self._load_hook

    def _set_input_size(self, size: tuple[int, ...]) -> None:
        positions = self._positions(size)
        inputs = self.in_channels // self.groups
        shape = (*positions, *self.kernel_size, inputs, self.out_channels)
        if self.has_uninitialized_params():
            self._materialize(shape)
            self.reset_parameters()
        else:  # a state dict came before the first batch
            checks.shape("weight", self.weight, shape, f"for an input of size {size}")
        self.input_size = size

    def _materialize(self, shape: tuple[int, ...]) -> None:
        cast(UninitializedParameter, self.weight).materialize(shape)
        if self.bias is not None:
            units = (*shape[: self._dims], self.out_channels)
            cast(UninitializedParameter, self.bias).materialize(units)

    def initialize_parameters(self, x: Tensor) -> None:
        """Make the parameters for inputs of this size, if there are none yet."""
        if self.input_size is None:
            self._check_input(x)
            self._set_input_size(tuple(x.shape[-self._dims :]))

    def _check_input(self, x: Tensor) -> bool:
        """Whether x is a batch, rather than one sample.

        Raises:
            TypeError: no tensor.
            ValueError: other dimensions or channels than the layer's.
        """
        checks.tensor("x", x)
        of_sample = self._dims + 1
        if x.dim() not in (of_sample, of_sample + 1) or x.shape[-of_sample] != self.in_channels:
            size = "height, width" if self._dims == 2 else "length"
            raise ValueError(
                f"x must have shape [batch, {self.in_channels}, {size}] or "
                f"[{self.in_channels}, {size}], got {tuple(x.shape)}."
            )
        return x.dim() > of_sample

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, U(±1/√fan_in) as `torch.nn.Conv2d` does, each position its own.

        fan_in is the number of inputs that one unit sees, in/groups times the window's size.
        """
        if self.has_uninitialized_params():
            return
        fan_in = math.prod(self.kernel_size) * self.in_channels // self.groups
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        clear_outside(self.weight, self.mask)

    def forward(self, x: Tensor) -> Tensor:
        """W[p]ᵀ window(x, p) + b[p] at every position p.

        Args:
            x: [batch, in, \\*size], or one sample [in, \\*size]; the batch may be empty.

        Returns:
            [batch, out, \\*positions], or [out, \\*positions].

        Raises:
            TypeError: a dtype other than the weight's, or one that the device does not support.
            ValueError: a shape or device that does not fit.
        """
        if self._check_input(x):
            return self._convolve(x)
        return self._convolve(x.unsqueeze(0)).squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _learning_weight(self) -> Tensor:
        """The weight as the forward pass takes it: its gradient is the weight's."""
        return self.weight

    @classmethod
    def _filled(cls, weight: Tensor, bias: Tensor | None, *args: Any, **options: Any) -> Self:
        """A layer with given parameters; nothing else is allocated, no random number drawn."""
        options |= {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        layer = cls(*args, **options)
        checks.shape("weight", weight, tuple(layer.weight.shape), "of the layer's weight")
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            checks.shape("bias", bias, tuple(cast(Tensor, layer.bias).shape), "[*positions, out]")
            layer.bias = nn.Parameter(bias)
        return layer

    @classmethod
    def _from_tied(cls, conv: nn.Conv1d | nn.Conv2d, input_size: Ints, **options: Any) -> Self:
        wanted = (nn.Conv1d, nn.Conv2d)[cls._dims - 1]
        if not isinstance(conv, wanted):
            raise TypeError(f"conv must be a {wanted.__name__}, got {type(conv).__name__}.")
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode of conv must be 'zeros', got {conv.padding_mode!r}.")
        size = cls._ints("input_size", input_size, 1)
        place: tuple[Any, ...] = (
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        channels = (conv.in_channels, conv.out_channels)
        positions = cls(*channels, *place, device="meta")._positions(size)
        weight = spread(conv.weight, positions)
        bias = None if conv.bias is None else conv.bias.detach().expand(*positions, -1).clone()
        layer = cls._filled(weight, bias, *channels, *place, input_size=size, **options)
        for copy, original in ((layer.weight, conv.weight), (layer.bias, conv.bias)):
            if copy is not None and original is not None:
                copy.requires_grad_(original.requires_grad)
        return layer.train(conv.training)

    @classmethod
    def from_keras(
        cls,
        kernel: Tensor | np.ndarray,
        bias: Tensor | np.ndarray | None = None,
        *,
        kernel_size: Ints,
        input_size: Ints,
        stride: Ints = 1,
    ) -> Self:
        """Take over the weights of a Keras layer, ``LocallyConnected2D`` or ``1D``.

        Of its implementation 1 and channels-last data, the defaults: then the kernel's second
        dimension runs over the window first and over the channels last. Keras keeps its maps
        [batch, \\*size, channels]; here they are [batch, channels, \\*size].

        Args:
            kernel: [positions, window · in, out], the positions of a map row by row.
            bias: [\\*positions, out], or ``None``.
            kernel_size, input_size, stride: as the layer has them.

        Returns:
            A layer of the kernel's dtype on its device, with copies of the values.

        Raises:
            TypeError: values that are not floating-point.
            ValueError: shapes that do not fit.
        """
        kernel = torch.as_tensor(kernel)
        checks.dims("kernel", kernel, 3, "[positions, window · in, out]")
        if not kernel.is_floating_point():
            raise TypeError(f"kernel must be floating-point, got {kernel.dtype}.")
        window = cls._ints("kernel_size", kernel_size, 1)
        inputs, rest = divmod(kernel.shape[1], math.prod(window))
        if rest:
            raise ValueError(
                f"kernel must have a multiple of {math.prod(window)} (the window) in its second "
                f"dimension, got {tuple(kernel.shape)}."
            )
        args = (inputs, kernel.shape[2], kernel_size, stride)
        positions = cls(*args, device="meta")._positions(cls._ints("input_size", input_size, 1))
        wanted = (math.prod(positions), *kernel.shape[1:])
        checks.shape("kernel", kernel, wanted, "[positions, window · in, out]")
        weight = kernel.detach().clone().reshape(*positions, *window, inputs, -1)
        if bias is not None:
            bias = torch.as_tensor(bias).detach().to(weight, copy=True)
        return cls._filled(weight, bias, *args, input_size=input_size)

    def to_keras(self) -> list[np.ndarray]:
        """The weights as a Keras layer of implementation 1 takes them (see `from_keras`).

        Returns:
            What ``set_weights`` wants: the kernel, and the bias if there is one.

        Raises:
            ValueError: padding, dilation or groups, which that layer does not have.
        """
        padded = self.padding != "valid" and self._place["padding"] != (0, 0)
        if padded or self._place["dilation"] != (1, 1) or self.groups != 1:
            raise ValueError(
                "Keras' locally connected layers have no padding, dilation or groups; "
                f"this layer is {self}."
            )
        features = math.prod(self.kernel_size) * self.in_channels
        arrays = [self.weight.reshape(-1, features, self.out_channels)]
        arrays += [] if self.bias is None else [self.bias]
        return [array.detach().cpu().numpy().copy() for array in arrays]

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        if self.padding != (0,) * self._dims:
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self._dims:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, input_size={self.input_size}"

    def _replicate_for_data_parallel(self) -> Self:
        # The mixin refuses at any time; here only a layer that still waits for its first batch.
        kind = LazyModuleMixin if self.has_uninitialized_params() else nn.Module
        return cast(Self, kind._replicate_for_data_parallel(self))
