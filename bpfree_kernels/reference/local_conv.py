"""Locally connected layers in plain PyTorch (equations: `bpfree_kernels.ops.local_conv`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree_kernels.geometry import Geometry
from bpfree_kernels.maps import like_maps
from bpfree_kernels.reference.activations import activate
from bpfree_kernels.reference.update import apply_rule, store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs


def local_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, slope: float, *geometry: int
) -> tuple[Tensor, Tensor]:
    """z and f(z), [batch, out, height, width]; an empty second tensor for the identity."""
    windows = _windows(x, weight.shape, Geometry(*geometry))
    kernel = _by_group(weight, Geometry(*geometry))
    z = torch.einsum("ngchwij,hwijcgo->ngohw", windows, kernel).flatten(1, 2)
    if bias is not None:
        z = z + bias.permute(2, 0, 1)
    z = like_maps(z, x)
    return z, z.new_empty(0) if activation == "identity" else activate(z, activation, slope)[0]


def local_conv_feedback(
    signal: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    activation: str,
    slope: float,
    height: int,
    width: int,
    *geometry: int,
) -> Tensor:
    """f′(gate) ⊙ Wᵀ signal, [batch, in, height, width]."""
    place = Geometry(*geometry)
    posts = signal.unflatten(1, (place.groups, -1))
    windows = torch.einsum("ngohw,hwijcgo->ngchwij", posts, _by_group(weight, place)).flatten(1, 2)
    (top, bottom), (left, right) = _margins(weight.shape, place, height, width)
    padded = signal.new_zeros(*windows.shape[:2], height + top + bottom, width + left + right)
    rows, columns, kernel_h, kernel_w = weight.shape[:4]
    for i in range(kernel_h):
        down = slice(i * place.dilation_h, i * place.dilation_h + rows * place.stride_h)
        for j in range(kernel_w):
            across = slice(j * place.dilation_w, j * place.dilation_w + columns * place.stride_w)
            part = padded[:, :, down, across][:, :, :: place.stride_h, :: place.stride_w]
            part += windows[..., i, j]
    change = F.pad(padded, (-left, -right, -top, -bottom))
    if gate is not None:
        change = change * activate(gate, activation, slope)[1]
    return like_maps(change, signal)


def local_conv_grad(
    signal: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: float,
    *rest: Any,
) -> None:
    """The gradients, written or added to those given; `rest` is the geometry and the targets."""
    *geometry, grad_weight, grad_bias, accumulate = rest
    grad = scale * _weight_gradient(signal, x, grad_weight.shape, Geometry(*geometry))
    store_gradient(grad_weight, grad if mask is None else grad * mask, accumulate)
    store_gradient(grad_bias, scale * _bias_gradient(signal), accumulate)


def local_conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    weight_mask: Tensor | None,
    feedback_mask: Tensor | None,
    scale: float,
    *rest: Any,
) -> None:
    """Weight, bias, feedback and their state updated in place."""
    geometry, rule, state = Geometry(*rest[:7]), UpdateArgs(*rest[7:15]), rest[15:]
    grad = scale * _weight_gradient(signal, x, weight.shape, geometry)
    grad_bias = scale * _bias_gradient(signal)
    _update_where(
        weight_mask,
        (weight, *state[:2]),
        lambda: update_layer(weight, bias, grad, grad_bias, rule, state[:6]),
    )
    if feedback is not None:
        learns = feedback
        _update_where(
            feedback_mask,
            (learns, *state[6:8]),
            lambda: apply_rule(learns, grad, *rule, *state[6:]),
        )


def _update_where(
    mask: Tensor | None, tensors: tuple[Tensor | None, ...], update: Callable[[], None]
) -> None:
    """Run an in-place update of some tensors, and undo it where a mask is False."""
    if mask is None:
        update()
        return
    before = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]
    update()
    for tensor, old in before:
        tensor.copy_(torch.where(mask, tensor, old))


def _by_group(weight: Tensor, place: Geometry) -> Tensor:
    return cast(Tensor, weight.unflatten(5, (place.groups, -1)))


def _margins(
    shape: torch.Size, place: Geometry, height: int, width: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What to pad a map by for its windows, ((top, bottom), (left, right)).

    Below and on the right at least as far as a strided slice of the windows may reach.
    """
    down = shape[0] * place.stride_h + place.dilation_h * (shape[2] - 1)
    across = shape[1] * place.stride_w + place.dilation_w * (shape[3] - 1)
    bottom = max(0, down - height - place.pad_top)
    right = max(0, across - width - place.pad_left)
    return (place.pad_top, bottom), (place.pad_left, right)


def _windows(x: Tensor, shape: torch.Size, place: Geometry) -> Tensor:
    """The window of every output position, [batch, groups, in/groups, rows, columns, kh, kw]."""
    rows, columns, kernel_h, kernel_w = shape[:4]
    (top, bottom), (left, right) = _margins(shape, place, x.shape[2], x.shape[3])
    padded = F.pad(x, (left, right, top, bottom))
    reach_h = place.dilation_h * (kernel_h - 1) + 1
    reach_w = place.dilation_w * (kernel_w - 1) + 1
    windows = padded.unfold(2, reach_h, place.stride_h)[:, :, :rows, :, :: place.dilation_h]
    windows = windows.unfold(3, reach_w, place.stride_w)[:, :, :, :columns, :, :: place.dilation_w]
    return cast(Tensor, windows.unflatten(1, (place.groups, -1)))


def _weight_gradient(signal: Tensor, x: Tensor, shape: torch.Size, place: Geometry) -> Tensor:
    posts = signal.unflatten(1, (place.groups, -1))
    windows = _windows(x, shape, place)
    return torch.einsum("ngohw,ngchwij->hwijcgo", posts, windows).flatten(5)


def _bias_gradient(signal: Tensor) -> Tensor:
    return signal.sum(0).permute(1, 2, 0)
