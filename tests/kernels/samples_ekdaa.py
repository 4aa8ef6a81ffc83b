"""Arguments, in schema order, for each registered op of convolutions that learn and of EKDAA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels.geometry import Geometry, MaxPool

from .conv_layers import LAYERS, Drawn, draw

LAYER = LAYERS["everything"]
PLACE = Geometry(
    stride_h=2, stride_w=3, pad_top=2, pad_left=1, dilation_h=2, dilation_w=1, groups=2
)
"""The same geometry as the bodies get it."""

NO_POOL, POOL, OVERLAPPING = (
    MaxPool(1).windows(),
    MaxPool(2).windows(),
    MaxPool(3, 2, 1).windows(),
)

Samples = list[tuple[Any, ...]]


def _layer(dtype: torch.dtype = torch.float32, batch: int = LAYER.batch, **order: Any) -> Drawn:
    """The tensors, their maps in the order in memory that is given."""
    t = draw(LAYER.with_batch(batch), dtype, "cpu")
    if order:
        t.x, t.signal = (maps.to(**order) for maps in (t.x, t.signal))
    return t


def _step() -> Samples:
    samples: Samples = []
    rate = torch.tensor(0.1)
    for t, rule, learns in (
        (_layer(), bk.SGD(0.1), False),
        (_layer(memory_format=torch.channels_last), bk.SGD(rate, momentum=0.9), True),
        (_layer(torch.float64), bk.AdamW(rate), True),
    ):
        feedback = t.feedback if learns else None
        states = [rule.new_param_state(t.weight), rule.new_param_state(t.bias)]
        states.append(rule.new_param_state(t.feedback) if learns else bk.ParamState())
        kept = [tensor for state in states for tensor in (state.m, state.v, state.step)]
        samples.append(
            (t.signal, t.x, t.weight, t.bias, feedback, 0.5, 0.1, *PLACE, *rule.args(), *kept)
        )
    return samples


def _grad() -> Samples:
    samples: Samples = []
    for t, accumulate in (
        (_layer(), False),
        (_layer(torch.float64), True),
        (_layer(batch=0), True),
    ):
        bias = torch.ones_like(t.bias) if accumulate else None
        grads = (torch.ones_like(t.weight), bias, accumulate)
        samples.append((t.signal, t.x, 0.5, *PLACE, *grads))
    return samples


def _maps(t: Drawn, height: int, width: int) -> Tensor:
    """Pre-activations of maps of another size, in the dtype and the order of the layer's input."""
    z = torch.randn(*t.x.shape[:2], height, width, dtype=t.x.dtype)
    last = t.x.is_contiguous(memory_format=torch.channels_last)
    return z.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def _error() -> Samples:
    first, last = _layer(torch.float64), _layer(memory_format=torch.channels_last)
    empty, (height, width) = _layer(batch=0), LAYER.size
    return [
        (first.x.cos(), first.x, 0.9, "argmax", *NO_POOL, "tanh", 0.0),
        (last.x, _maps(last, 2 * height, 2 * width + 1), 0.9, "nearest", *POOL, "hardtanh", 0.5),
        (last.x, _maps(last, 2 * height, 2 * width), 0.9, "argmax", *OVERLAPPING, "tanh", 0.0),
        (empty.x, _maps(empty, 2 * height, 2 * width), 0.9, "average", *OVERLAPPING, "relu", 0.0),
    ]


def _linear_error() -> Samples:
    matrix = torch.randn(6, 5)
    return [
        (torch.randn(3, 6), matrix, torch.randn(3, 5), 0.9, "tanh", 0.0),
        (torch.randn(3, 6).double(), matrix.double(), torch.randn(3, 5).double(), 0.9, "sign", 0.0),
        (torch.randn(0, 6), matrix, torch.randn(0, 5), 0.9, "leaky_relu", 0.5),
    ]


def _conv_error() -> Samples:
    first, last = _layer(torch.float64), _layer(memory_format=torch.channels_last)
    empty, (height, width) = _layer(batch=0), LAYER.size

    def sample(t: Drawn, z: Tensor, *how: Any) -> tuple[Any, ...]:
        return (t.signal, t.feedback, z, 0.9, *PLACE, height, width, *how)

    return [
        sample(first, first.x, "argmax", *NO_POOL, "tanh", 0.0),
        sample(last, _maps(last, 2 * height, 2 * width + 1), "argmax", *POOL, "hardtanh", 0.5),
        sample(last, _maps(last, 2 * height, 2 * width), "average", *OVERLAPPING, "tanh", 0.0),
        sample(empty, _maps(empty, 2 * height, 2 * width), "nearest", *POOL, "relu", 0.0),
    ]


CONV: dict[str, Callable[[], Samples]] = {"conv_step": _step, "conv_grad": _grad}
"""Ops of convolutions."""

EKDAA: dict[str, Callable[[], Samples]] = {
    "ekdaa_error": _error,
    "ekdaa_linear_error": _linear_error,
    "ekdaa_conv_error": _conv_error,
}
"""Ops of errors."""
