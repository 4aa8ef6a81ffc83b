"""Arguments, in schema order, for each registered op of locally connected layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bpfree_kernels as bk
from bpfree_kernels.geometry import Geometry

from .local_layers import LAYERS, Drawn, draw

LAYER = LAYERS["everything"]
PLACE = Geometry(
    stride_h=2, stride_w=3, pad_top=2, pad_left=1, dilation_h=2, dilation_w=1, groups=2
)
"""The same geometry as the bodies get it."""

Samples = list[tuple[Any, ...]]


def _layer(dtype: torch.dtype = torch.float32, batch: int = LAYER.batch, **order: Any) -> Drawn:
    """The tensors, their maps in the order in memory that is given."""
    t = draw(LAYER.with_batch(batch), dtype, "cpu")
    if order:
        t.x, t.signal, t.gate = (maps.to(**order) for maps in (t.x, t.signal, t.gate))
    return t


def _forward() -> Samples:
    first, last = _layer(torch.float64), _layer(memory_format=torch.channels_last)
    empty = _layer(batch=0)
    return [
        (first.x, first.weight, first.bias, "tanh", 0.0, *PLACE),
        (last.x, last.weight, None, "hardtanh", 0.5, *PLACE),
        (last.x, last.weight, last.bias, "identity", 0.0, *PLACE),
        (empty.x, empty.weight, None, "relu", 0.0, *PLACE),
    ]


def _feedback() -> Samples:
    first, last = _layer(torch.float64), _layer(memory_format=torch.channels_last)
    empty = _layer(batch=0)
    return [
        (first.signal, first.weight, first.gate, "tanh", 0.0, *LAYER.size, *PLACE),
        (last.signal, last.weight, last.gate, "hardtanh", 0.5, *LAYER.size, *PLACE),
        (last.signal, last.weight, None, "identity", 0.0, *LAYER.size, *PLACE),
        (empty.signal, empty.weight, None, "identity", 0.0, *LAYER.size, *PLACE),
    ]


def _grad() -> Samples:
    samples: Samples = []
    for t, masked, accumulate in ((_layer(), True, False), (_layer(torch.float64), False, True)):
        mask = t.weight > 0 if masked else None
        bias = torch.ones_like(t.bias) if masked else None
        grads = (torch.ones_like(t.weight), bias, accumulate)
        samples.append((t.signal, t.x, mask, 0.5, *PLACE, *grads))
    return samples


def _step() -> Samples:
    samples: Samples = []
    rate = torch.tensor(0.1)
    for t, rule, learns in (
        (_layer(), bk.SGD(0.1), False),
        (_layer(memory_format=torch.channels_last), bk.SGD(rate, momentum=0.9), True),
        (_layer(torch.float64), bk.AdamW(rate), True),
    ):
        feedback = 2 * t.weight if learns else None
        masks = (t.weight > 0, t.weight < 0.5) if learns else (None, None)
        state = rule.new_state(t.weight, t.bias)
        of_feedback = bk.ParamState() if feedback is None else rule.new_param_state(feedback)
        kept = [
            tensor
            for param in (state.weight, state.bias, of_feedback)
            for tensor in (param.m, param.v, param.step)
        ]
        samples.append(
            (t.signal, t.x, t.weight, t.bias, feedback, *masks, 0.5, *PLACE, *rule.args(), *kept)
        )
    return samples


def _differentiable() -> list[Drawn]:
    made = [_layer(), _layer(memory_format=torch.channels_last)]
    for t in made:
        for name, tensor in vars(t).items():
            setattr(t, name, tensor.requires_grad_())
    return made


def _local_conv() -> Samples:
    first, last = _differentiable()
    return [
        (first.x, first.weight, first.bias, first.weight > 0, *PLACE, None),
        (last.x, last.weight, None, None, *PLACE, "reference"),
    ]


def _input_grad() -> Samples:
    return [(t.signal, t.weight, *LAYER.size, *PLACE, None) for t in _differentiable()]


def _weight_grad() -> Samples:
    first, last = _differentiable()
    return [
        (first.signal, first.x, first.weight, first.weight > 0, *PLACE, None),
        (last.signal, last.x, last.weight, None, *PLACE, None),
    ]


DIFFERENTIABLE: dict[str, Callable[[], Samples]] = {
    "local_conv": _local_conv,
    "local_conv_input_grad": _input_grad,
    "local_conv_weight_grad": _weight_grad,
}
"""Ops with a derivative: they are made of the other ops, and have no bodies of their own."""

LOCAL_CONV: dict[str, Callable[[], Samples]] = {
    "local_conv_forward": _forward,
    "local_conv_feedback": _feedback,
    "local_conv_grad": _grad,
    "local_conv_step": _step,
}
"""Ops with a body for each backend."""
