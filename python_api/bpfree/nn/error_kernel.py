"""Layers that learn by error kernels (EKDAA, Zee et al. 2023) in an ordinary training loop.

::

    ErrorKernel*        z = W x + b       backward: d = Eᵀ e,   ∂W = Σ_batch e xᵀ,   ∂E = γ ∂W
    TargetActivation    y = f(z)          backward: e = f(z) − f(z − β d)

e is what arrives at z, d what arrives at y. A convolution's Eᵀ is the transposed convolution with E, and its
∂W sums over space. Nothing asks for the derivative of f, which may be ``sign``. Anything may lie between,
as in any graph: torch's own `torch.nn.MaxPool2d` takes d back to the largest unit of each window. Where units
are often equal, as under ``sign``, pool z rather than f(z): the target is then that of the largest z.

E lies in W's layout, in the buffer `feedback`. It is no parameter of the model, but learns like one: hand the
E of all layers to the optimizer. The first error is the gradient of the loss in the output, so that a sum
over the batch, not a mean, moves the targets as the paper does (β is not divided by the batch)::

    model = nn.Sequential(
        bpfree.nn.ErrorKernelConv2d(1, 32, 3), bpfree.nn.TargetActivation("tanh"), nn.MaxPool2d(2),
        nn.Flatten(), bpfree.nn.ErrorKernelLinear(5408, 10),
    )
    optimizer = torch.optim.SGD([*model.parameters(), *bpfree.nn.feedback_weights(model)], lr=5e-4)
    loss = F.cross_entropy(model(x), y, reduction="sum")      # its gradient: softmax − target
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()                                     # model.zero_grad() would leave E's gradients

A net of dense layers learns by LRA-E (Ororbia and Mali 2019). `bpfree.EKDAA` runs the same rule on ordinary
layers.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bpfree.nn._feedback_layer import FeedbackLayer
from bpfree.nn.feedback import FeedbackConv2d, FeedbackLinear
from bpfree_kernels import checks
from bpfree_kernels.activations import DEFAULT_SLOPE, resolve_activation
from bpfree_kernels.geometry import MaxPool
from bpfree_kernels.maps import as_maps
from bpfree_kernels.ops.local_conv import Ints
from bpfree_kernels.reference.activations import value


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)


class _ErrorKernel(FeedbackLayer):
    """A layer whose feedback learns γ times what its weight learns."""

    gamma: float

    @property
    def feedback_scale(self) -> float:
        """γ."""
        return self.gamma

    def _feedback_repr(self) -> str:
        return f"gamma={self.gamma:g}"


class ErrorKernelLinear(_ErrorKernel, FeedbackLinear):
    """`torch.nn.Linear` whose input gradient goes through an error matrix E (see `bpfree.nn.error_kernel`).

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear` has them.
        gamma: factor γ of E's gradient, ∂E = γ ∂W; 0 for an E that stays. The paper prints a minus before
            it, with which the layers below unlearn.

    Attributes:
        weight: W, [out, in].
        feedback: E, [out, in], a buffer, drawn from U(±√(6/(in + out))) for itself. Write to it in place
            (``feedback.data.copy_``).
        gamma: γ.

    Raises:
        ValueError: a gamma that is not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gamma = _finite("gamma", gamma)


class ErrorKernelConv2d(_ErrorKernel, FeedbackConv2d):
    """`torch.nn.Conv2d` whose input gradient goes through error kernels E (see `bpfree.nn.error_kernel`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as `torch.nn.Conv2d` has them.
        gamma: as `ErrorKernelLinear` has it.

    Attributes:
        weight: W, [out, in/groups, kernel_h, kernel_w].
        feedback: E, shaped like W, a buffer, drawn from U(±√(6/(k·k·(in/groups + out)))) for itself.
        gamma: γ.

    Raises:
        TypeError, ValueError: as `ErrorKernelLinear` and `torch.nn.Conv2d`.
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
        gamma: float = 0.1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.gamma = _finite("gamma", gamma)


_UNITS = MaxPool(1).windows()  # no pooling: every window one unit


class _TowardsTarget(torch.autograd.Function):
    """f(z); the gradient d that arrives goes on as the distance from the target."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, beta: float, activation: str, slope: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.options = (beta, "argmax", *_UNITS, activation, slope)
        return value(z, activation, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        # Under autocast z is bfloat16 on the CPU, too, where the op takes float32 and float64 alone.
        kind = z.dtype if z.is_cuda else torch.promote_types(z.dtype, torch.float32)
        # Units in any order are maps of one unit.
        shape = z.shape if z.dim() == 4 else (1, z.numel(), 1, 1)
        change, maps = (as_maps(t.reshape(shape).to(kind)) for t in (change, z))
        # The op beneath bpfree_kernels.ekdaa_error: there is nothing left to check, and torch.compile
        # traces no checks in a backward pass.
        e = torch.ops.bpfree.ekdaa_error(change, maps, *ctx.options)
        return e.view(z.shape).to(z.dtype), None, None, None


class TargetActivation(nn.Module):
    """An activation f that sends down how far its units are from their target, of any shape.

    Forward f(z). Backward, a change d that arrives as the gradient of f(z) moves the units to the target
    f(z − β d), and the gradient of z is e = f(z) − f(z − β d), formed without cancellation
    (`bpfree_kernels.ekdaa_error`). With f the identity and β = 1 that is d itself.

    Args:
        activation: name of f, see `bpfree_kernels.activations`.
        beta: β, how far the target is moved.
        slope: parameter of ``leaky_relu`` and ``hardtanh``.

    Raises:
        ValueError: an unknown activation, a slope that does not fit it, or a beta that is not finite.
    """

    def __init__(
        self, activation: str = "tanh", beta: float = 0.9, slope: float | None = None
    ) -> None:
        super().__init__()
        self.activation, self.slope = resolve_activation(activation, slope)
        self.beta = _finite("beta", beta)

    def forward(self, z: Tensor) -> Tensor:
        """f(z), shaped like z.

        Raises:
            TypeError: on a GPU, a dtype other than float32, bfloat16 and float16.
        """
        if z.is_cuda:
            checks.floating("z", z)
        args = (z, self.beta, self.activation, self.slope)
        return cast(Tensor, _TowardsTarget.apply(*args))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        text = f"{self.activation!r}, beta={self.beta:g}"
        return f"{text}, slope={self.slope:g}" if self.activation in DEFAULT_SLOPE else text
