"""Arguments, in schema order, for each registered op of inverses and of invertible convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels.geometry import Geometry

from .invertible_layers import LAYERS, Drawn, draw

LAYER = LAYERS["everything"]
PLACE = Geometry(
    stride_h=2, stride_w=3, pad_top=2, pad_left=1, dilation_h=2, dilation_w=1, groups=1
)
"""The same geometry as the bodies get it."""

Samples = list[tuple[Any, ...]]


def _layer(
    dtype: torch.dtype = torch.float32,
    batch: int = LAYER.batch,
    order: torch.memory_format = torch.contiguous_format,
) -> Drawn:
    """The tensors, all maps in the same order in memory."""
    t = draw(LAYER.with_batch(batch), dtype, "cpu")
    for name in ("x", "output", "target"):
        setattr(t, name, getattr(t, name).contiguous(memory_format=order))
    return t


def _orthogonality() -> Samples:
    return [(_layer().weight,), (_layer(torch.float64).weight.flatten(1),)]


def _gram(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    return rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)


def _solve() -> Samples:
    samples: Samples = []
    for dtype, batch, tolerance in (
        (torch.float32, 5, 0.0),
        (torch.float64, 3, 1e-3),
        (torch.float32, 0, 0.0),
    ):
        signal = torch.randn(batch, LAYER.outputs, dtype=dtype)
        samples.append((signal, _gram(_layer(dtype).weight), tolerance, 7))
    return samples


def _refine() -> Samples:
    first, wide = _layer(), _layer(torch.float64)
    return [(first.weight, first.inverse), (wide.weight.flatten(1), wide.weight.flatten(1))]


def _update() -> Samples:
    samples: Samples = []
    rate = torch.tensor(0.1)
    for dtype, rule, off_diagonal in (
        (torch.float32, bk.SGD(0.1), False),
        (torch.float32, bk.SGD(rate, momentum=0.9, nesterov=True), True),
        (torch.float64, bk.AdamW(rate), True),
    ):
        t = _layer(dtype)
        state = rule.new_param_state(t.weight)
        kept = (state.m, state.v, state.step)
        read = (t.weight.cos(), _gram(t.weight), t.weight)
        samples.append((*read, 0.1, off_diagonal, *rule.args(), *kept))
    return samples


def _reconstruct() -> Samples:
    first, last = _layer(torch.float64), _layer(order=torch.channels_last)
    empty = _layer(batch=0)

    def sample(t: Drawn, *how: Any) -> tuple[Any, ...]:
        return (t.output, t.x, t.inverse, *how)

    return [
        sample(first, first.bias, first.target, first.rate, *PLACE, "leaky_relu", 0.1),
        sample(last, None, None, None, *PLACE, "identity", 0.0),
        sample(empty, None, empty.target, empty.rate, *PLACE, "leaky_relu", 0.01),
    ]


def _error() -> Samples:
    first, last = _layer(torch.float64), _layer(order=torch.channels_last)
    empty = _layer(batch=0)

    def sample(t: Drawn, features: int, gate: Tensor | None, *how: Any) -> tuple[Any, ...]:
        order = torch.contiguous_format if t.output.is_contiguous() else torch.channels_last
        signal = t.output[:, :features].contiguous(memory_format=order)
        return (signal, t.inverse[:features], gate, *LAYER.size, *PLACE, *how)

    return [
        sample(first, LAYER.outputs, first.x, "tanh", 0.0),
        sample(last, 5, None, "identity", 0.0),
        sample(last, 5, last.x.contiguous(), "hardtanh", 0.5),
        sample(empty, 3, empty.x, "leaky_relu", 0.1),
    ]


INVERSE: dict[str, Callable[[], Samples]] = {
    "orthogonality": _orthogonality,
    "solve_nearly_orthogonal": _solve,
    "refine_inverse": _refine,
    "orthogonal_update": _update,
}
"""Ops on inverses of weights."""

INVERTIBLE_CONV: dict[str, Callable[[], Samples]] = {
    "invertible_conv_reconstruct": _reconstruct,
    "invertible_conv_error": _error,
}
"""Ops of invertible convolutions."""
