"""A valid call of every public function, for the tests of what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bpfree_kernels as bk

from . import cases

Arguments = dict[str, Any]


def _layer(*names: str) -> Arguments:
    tensors = cases.drtp_case().tensors
    return {name: tensors[name] for name in names}


def _drtp() -> Arguments:
    return _layer("x", "weight", "bias", "feedback", "labels")


def _classifier() -> Arguments:
    return _layer("x", "weight", "bias", "labels")


def _dense() -> Arguments:
    return dict(cases.dense_case().tensors)


def _pepita() -> Arguments:
    return {**cases.pepita_case().tensors, "activation": "tanh"}


def _difference() -> Arguments:
    z, change, basis = torch.randn(5, 6), torch.randn(5, 3), torch.randn(3, 6)
    return {"z": z, "change": change, "basis": basis, "activation": "tanh"}


def _learning(arguments: Arguments) -> Arguments:
    rule = bk.Adam(0.1)
    state = rule.new_state(arguments["weight"], arguments["bias"])
    return {**arguments, "update": rule, "state": state}


def _signal() -> Arguments:
    return {"z": torch.randn(5, 6), **_layer("feedback", "labels")}


def _update() -> Arguments:
    param, rule = torch.randn(4, 5), bk.Adam(0.1)
    return {
        "param": param,
        "grad": torch.randn(4, 5),
        "update": rule,
        "state": rule.new_param_state(param),
    }


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "drtp_linear_step": (bk.drtp_linear_step, lambda: _learning(_drtp())),
    "drtp_linear_grad": (bk.drtp_linear_grad, _drtp),
    "drtp_signal": (bk.drtp_signal, _signal),
    "classifier_forward": (bk.classifier_forward, _classifier),
    "classifier_step": (bk.classifier_step, lambda: _learning(_classifier())),
    "classifier_grad": (bk.classifier_grad, _classifier),
    "dense_forward": (bk.dense_forward, lambda: _layer("x", "weight", "bias")),
    "dense_step": (bk.dense_step, lambda: _learning(_dense())),
    "dense_grad": (bk.dense_grad, _dense),
    "pepita_linear_step": (bk.pepita_linear_step, lambda: _learning(_pepita())),
    "pepita_linear_grad": (bk.pepita_linear_grad, _pepita),
    "pepita_difference": (bk.pepita_difference, _difference),
    "apply_update": (bk.apply_update, _update),
}
"""Every public function, with arguments that are right for it."""
