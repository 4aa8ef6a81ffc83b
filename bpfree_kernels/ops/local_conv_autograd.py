"""The locally connected layer as a differentiable function.

The layer is linear in its input and in its weight, so its gradients are ops of the same family, and so are
theirs: ⟨δ, W x⟩ has three factors, and each op here is its derivative by one of them. That makes every
order of differentiation exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.geometry import GEOMETRY_SCHEMA
from bpfree_kernels.maps import as_maps
from bpfree_kernels.ops._define import LIBRARY
from bpfree_kernels.ops.local_conv import Ints, check_layer, check_mask


def local_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve with a weight of its own at each position; differentiable any number of times.

    Under autocast it computes in autocast's dtype on a GPU, in float32 on the CPU.

    Args:
        x: maps, [batch, in, height, width]; the batch may be empty.
        weight: [rows, columns, kernel_h, kernel_w, in/groups, out].
        bias: [rows, columns, out], or ``None``.
        stride, dilation, groups: as `torch.nn.Conv2d` has them.
        padding: zeros around the map: an int, a pair (height, width), ``"same"`` or ``"valid"``.
        mask: bool, shaped like `weight`: the weight's gradient is 0 where it is False. The forward
            pass does not read it: weights that do not exist must be 0.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        [batch, out, rows, columns].

    Raises:
        TypeError, ValueError, RuntimeError: as `local_conv_forward`; a mask as in `local_conv_step`.
    """
    checks.tensor("x", x)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if device == "cuda" else torch.float32
        with torch.autocast(device, enabled=False):
            cast_bias = None if bias is None else bias.to(dtype)
            return local_conv(
                x.to(dtype), weight.to(dtype), cast_bias, stride=stride, padding=padding,
                dilation=dilation, groups=groups, mask=mask, backend=backend,
            )  # fmt: skip
    place = check_layer(x, weight, bias, stride, padding, dilation, groups)
    check_mask("mask", mask, weight)
    backends.body("local_conv_forward", device, backend)  # says now what cannot run
    return cast(Tensor, torch.ops.bpfree.local_conv(x, weight, bias, mask, *place, backend))


def _body(name: str, maps: Tensor, backend: str | None) -> Callable[..., Any]:
    return backends.body(name, maps.device.type, backend)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, _mask: Tensor | None, *rest: Any
) -> Tensor:
    *place, backend = rest
    if bias is not None:
        bias = bias.contiguous()
    run = _body("local_conv_forward", x, backend)
    return cast(Tensor, run(as_maps(x), weight.contiguous(), bias, "identity", 0.0, *place)[0])


def _input_grad(signal: Tensor, weight: Tensor, height: int, width: int, *rest: Any) -> Tensor:
    *place, backend = rest
    run = _body("local_conv_feedback", signal, backend)
    size = (height, width)
    kernel = weight.contiguous()
    return cast(Tensor, run(as_maps(signal), kernel, None, "identity", 0.0, *size, *place))


def _weight_grad(
    signal: Tensor, x: Tensor, like: Tensor, mask: Tensor | None, *rest: Any
) -> Tensor:
    *place, backend = rest
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    if mask is not None:
        mask = mask.contiguous()
    run = _body("local_conv_grad", x, backend)
    run(as_maps(signal), as_maps(x), mask, 1.0, *place, grad, None, False)
    return grad


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, mask, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, mask)


def _forward_backward(ctx: Any, signal: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.bpfree.local_conv_input_grad(signal, weight, *x.shape[2:], *ctx.rest)
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.bpfree.local_conv_weight_grad(signal, x, weight, mask, *ctx.rest)
    if ctx.needs_input_grad[2]:
        of_bias = signal.sum(0).permute(1, 2, 0)
    return of_x, of_weight, of_bias, None, *(None for _ in ctx.rest)


def _keep_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, weight, _, _, *ctx.rest = inputs
    ctx.save_for_backward(signal, weight)


def _input_grad_backward(ctx: Any, by_x: Tensor) -> tuple[Tensor | None, ...]:
    signal, weight = ctx.saved_tensors
    of_signal = of_weight = None
    if ctx.needs_input_grad[0]:
        of_signal = torch.ops.bpfree.local_conv(by_x, weight, None, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.bpfree.local_conv_weight_grad(signal, by_x, weight, None, *ctx.rest)
    return of_signal, of_weight, None, None, *(None for _ in ctx.rest)


def _keep_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, x, _, mask, *ctx.rest = inputs
    ctx.save_for_backward(signal, x, mask)


def _weight_grad_backward(ctx: Any, by_weight: Tensor) -> tuple[Tensor | None, ...]:
    signal, x, mask = ctx.saved_tensors
    weight = by_weight if mask is None else by_weight * mask
    of_signal = of_x = None
    if ctx.needs_input_grad[0]:
        of_signal = torch.ops.bpfree.local_conv(x, weight, None, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        of_x = torch.ops.bpfree.local_conv_input_grad(signal, weight, *x.shape[2:], *ctx.rest)
    return of_signal, of_x, None, None, *(None for _ in ctx.rest)


_REST = f"{GEOMETRY_SCHEMA}, str? backend) -> Tensor"

for _name, _schema, _run, _keep, _backward in (
    (
        "local_conv",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, ",
        _forward,
        _keep_forward,
        _forward_backward,
    ),
    (
        "local_conv_input_grad",
        "(Tensor signal, Tensor weight, SymInt height, SymInt width, ",
        _input_grad,
        _keep_input_grad,
        _input_grad_backward,
    ),
    (
        "local_conv_weight_grad",
        "(Tensor signal, Tensor x, Tensor like, Tensor? mask, ",
        _weight_grad,
        _keep_weight_grad,
        _weight_grad_backward,
    ),
):
    LIBRARY.define(_name + _schema + _REST, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    # The bodies run on fake tensors, too, because the ops that they call do.
    torch.library.register_fake(f"bpfree::{_name}", _run, lib=LIBRARY)
    torch.library.register_autograd(f"bpfree::{_name}", _backward, setup_context=_keep, lib=LIBRARY)
