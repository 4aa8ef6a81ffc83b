"""A convolution's products in plain PyTorch (equations: `bpfree_kernels.ops.conv`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bpfree_kernels.geometry import Geometry
from bpfree_kernels.reference.update import apply_rule, store_gradient, update_layer
from bpfree_kernels.update import UpdateArgs


def input_gradient(
    signal: Tensor, weight: Tensor, height: int, width: int, place: Geometry
) -> Tensor:
    """What a signal at the output is at an input of this size, carried down through `weight`."""
    steps, apart = (place.stride_h, place.stride_w), (place.dilation_h, place.dilation_w)
    whole = F.conv_transpose2d(
        signal, weight, stride=steps, groups=place.groups, dilation=apart
    )  # from the first value under the first window
    below = place.pad_top + height - whole.shape[2]
    right = place.pad_left + width - whole.shape[3]
    return F.pad(whole, (-place.pad_left, right, -place.pad_top, below))


def weight_gradient(signal: Tensor, x: Tensor, shape: torch.Size, place: Geometry) -> Tensor:
    """∂W, summed over batch and positions."""
    rows, columns = signal.shape[2:]
    reach_h = (rows - 1) * place.stride_h + place.dilation_h * (shape[2] - 1) + 1
    reach_w = (columns - 1) * place.stride_w + place.dilation_w * (shape[3] - 1) + 1
    below = reach_h - place.pad_top - x.shape[2]
    right = reach_w - place.pad_left - x.shape[3]
    padded = F.pad(x, (place.pad_left, right, place.pad_top, below))
    if signal.numel() == 0 or padded.numel() == 0:
        return signal.new_zeros(shape)
    gradient: Tensor = conv2d_weight(
        padded, shape, signal, (place.stride_h, place.stride_w), 0,
        (place.dilation_h, place.dilation_w), place.groups,
    )  # fmt: skip
    return gradient


def conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    scale: float,
    feedback_scale: float,
    *rest: Any,
) -> None:
    """Weight, bias, feedback and their state updated in place."""
    geometry, rule, state = Geometry(*rest[:7]), UpdateArgs(*rest[7:15]), rest[15:]
    grad = scale * weight_gradient(signal, x, weight.shape, geometry)
    update_layer(weight, bias, grad, scale * signal.sum((0, 2, 3)), rule, state)
    if feedback is not None:
        apply_rule(feedback, feedback_scale * grad, *rule, *state[6:])


def conv_grad(signal: Tensor, x: Tensor, scale: float, *rest: Any) -> None:
    """The gradients, written or added to those given; `rest` is the geometry and the targets."""
    *geometry, grad_weight, grad_bias, accumulate = rest
    grad = scale * weight_gradient(signal, x, grad_weight.shape, Geometry(*geometry))
    store_gradient(grad_weight, grad, accumulate)
    store_gradient(grad_bias, scale * signal.sum((0, 2, 3)), accumulate)
