"""Arguments, in schema order, for the registered ops that treat each unit, map or parameter by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import bpfree_kernels as bk

Samples = list[tuple[Any, ...]]


def _max_pool() -> Samples:
    y = torch.randn(2, 5, 6, 3)
    place = (3, 3, 2, 2, 2, 2, 1, 0, 1, 1)
    return [(y, None, *place), (y.double(), y.double().cos(), *place)]


def _difference() -> Samples:
    z, basis = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 4, 4)
    error = torch.randn(2, 5)
    return [(z, error, basis, "relu", 0.0), (z, basis[:2], None, "leaky_relu", 0.5)]


def _signal() -> Samples:
    z, feedback = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 4, 4)
    labels = torch.tensor([4, 0])
    return [(z, feedback, labels, "tanh", 0.0), (z, feedback, labels.int(), "hardtanh", 0.5)]


def _update() -> Samples:
    param, grad = torch.randn(3, 4), torch.randn(3, 4)
    samples: Samples = []
    for rule, scale, max_norm in (
        (bk.SGD(0.1), 1.0, math.inf), (bk.SGD(0.1, momentum=0.9), -0.5, 0.1),
        (bk.Adam(torch.tensor(0.1)), 2.0, 99.0),
    ):  # fmt: skip
        state = rule.new_param_state(param)
        moments = (state.m, state.v, state.step)
        samples.append((param.clone(), grad, scale, max_norm, *rule.args(), *moments))
    return samples


ELEMENTWISE: dict[str, Callable[[], Samples]] = {
    "apply_update": _update,
    "drtp_signal": _signal,
    "pepita_difference": _difference,
    "pepita_difference_": _difference,
    "pepita_max_pool": _max_pool,
}
"""Each has a body for each backend."""
