"""A valid call of every public function, for the tests of what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bpfree_kernels as bk

from . import cases
from .invertible_layers import Layer, draw

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


def _max_pool() -> Arguments:
    y = torch.randn(2, 3, 4, 5)
    return {"y": y, "kernel_size": 2, "change": y.cos()}


def _local_conv(*names: str, **others: Any) -> Arguments:
    """The tensors named and the geometry: 3 × 2 to 2 × 1 maps, 7 to 6 channels."""
    case = cases.local_conv_case()
    place = {name: value for name, value in case.options.items() if name != "scale"}
    return {**{name: case.tensors[name] for name in names}, **place, **others}


def _local_conv_feedback() -> Arguments:
    gate = torch.randn(5, 7, 3, 2)
    return _local_conv("signal", "weight", input_size=(3, 2), gate=gate, activation="tanh")


def _local_conv_step() -> Arguments:
    arguments = _learning(_local_conv("signal", "x", "weight", "bias"))
    feedback = torch.randn_like(arguments["weight"])
    return {
        **arguments,
        "feedback": feedback,
        "feedback_state": arguments["update"].new_param_state(feedback),
        "weight_mask": feedback > 0,
        "feedback_mask": feedback < 0.5,
    }


def _local_conv_grad() -> Arguments:
    arguments = _local_conv("signal", "x", "weight", "bias")
    return {**arguments, "mask": arguments["weight"] > 0}


def _differentiable() -> Arguments:
    arguments = _local_conv("x", "weight", "bias")
    return {**arguments, "mask": arguments["weight"] > 0}


def _learning(arguments: Arguments) -> Arguments:
    rule = bk.Adam(0.1)
    state = rule.new_state(arguments["weight"], arguments["bias"])
    return {**arguments, "update": rule, "state": state}


def _beside(arguments: Arguments) -> Arguments:
    """A layer that learns, and a weight that learns beside its own."""
    arguments = _learning(arguments)
    feedback = torch.randn_like(arguments["weight"])
    kept = arguments["update"].new_param_state(feedback)
    return {**arguments, "feedback": feedback, "feedback_state": kept}


def _conv() -> Arguments:
    """Tensors and geometry: 3 × 2 to 2 × 1 maps, 7 to 6 channels."""
    case = cases.conv_case()
    place = {name: value for name, value in case.options.items() if name != "scale"}
    return {**case.tensors, **place}


def _error() -> Arguments:
    z, change = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 2, 3)
    return {"change": change, "z": z, "pool": bk.MaxPool(2)}


def _linear_error() -> Arguments:
    return {"error": torch.randn(5, 6), "feedback": torch.randn(6, 7), "z": torch.randn(5, 7)}


def _conv_error() -> Arguments:
    arguments = _conv()
    tensors = {name: arguments.pop(name) for name in ("signal", "x", "weight", "bias")}
    z, pool = torch.randn(5, 7, 6, 5), bk.MaxPool(2)
    return {
        "error": tensors["signal"], "feedback": tensors["weight"], "z": z, "pool": pool, **arguments,
    }  # fmt: skip


INVERTIBLE = Layer(5, 2, (4, 3), (3, 2), {"stride": (2, 1), "padding": (1, 0)})
"""4 × 3 to 2 × 2 maps, 2 to 12 channels."""


def _invertible(*names: str, **others: Any) -> Arguments:
    """The tensors named of an invertible layer."""
    tensors = vars(draw(INVERTIBLE, torch.float32, "cpu"))
    return {**{name: tensors[name] for name in names}, **others}


def _reconstruction() -> Arguments:
    names = ("output", "x", "inverse", "bias", "target", "rate")
    return _invertible(*names, **INVERTIBLE.place)


def _carried_down() -> Arguments:
    t = _invertible("output", "inverse", "x")
    features = {"signal": t["output"][:, :7], "inverse": t["inverse"][:7]}
    return {**features, "input_size": (4, 3), "gate": t["x"], **INVERTIBLE.place}


def _refinement(name: str) -> Arguments:
    arguments = _invertible("weight", "inverse")
    return {"weight": arguments["weight"], name: arguments["inverse"]}


def _regularised() -> Arguments:
    arguments = _invertible("weight", update=bk.Adam(0.1), penalty=0.5)
    state = arguments["update"].new_param_state(arguments["weight"])
    grad, gram = torch.randn(12, 2, 3, 2), torch.randn(12, 12)
    return {**arguments, "grad": grad, "orthogonality": gram + gram.t(), "state": state}


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
    "dense_step": (bk.dense_step, lambda: _beside(_dense())),
    "dense_grad": (bk.dense_grad, _dense),
    "pepita_linear_step": (bk.pepita_linear_step, lambda: _learning(_pepita())),
    "pepita_linear_grad": (bk.pepita_linear_grad, _pepita),
    "pepita_difference": (bk.pepita_difference, _difference),
    "pepita_max_pool": (bk.pepita_max_pool, _max_pool),
    "local_conv": (bk.local_conv, _differentiable),
    "local_conv_forward": (
        bk.local_conv_forward, lambda: _local_conv("x", "weight", "bias", activation="tanh")
    ),
    "local_conv_feedback": (bk.local_conv_feedback, _local_conv_feedback),
    "local_conv_step": (bk.local_conv_step, _local_conv_step),
    "local_conv_grad": (bk.local_conv_grad, _local_conv_grad),
    "conv_step": (bk.conv_step, lambda: _beside(_conv())),
    "conv_grad": (bk.conv_grad, _conv),
    "ekdaa_error": (bk.ekdaa_error, _error),
    "ekdaa_linear_error": (bk.ekdaa_linear_error, _linear_error),
    "ekdaa_conv_error": (bk.ekdaa_conv_error, _conv_error),
    "orthogonality": (bk.orthogonality, lambda: _invertible("weight")),
    "solve_nearly_orthogonal": (
        bk.solve_nearly_orthogonal,
        lambda: {"signal": torch.randn(5, 12), "orthogonality": torch.eye(12) / 4},
    ),
    "refine_inverse": (bk.refine_inverse, lambda: _refinement("inverse")),
    "invert": (bk.invert, lambda: _refinement("start")),
    "orthogonal_update": (bk.orthogonal_update, _regularised),
    "invertible_conv_reconstruct": (bk.invertible_conv_reconstruct, _reconstruction),
    "invertible_conv_error": (bk.invertible_conv_error, _carried_down),
    "apply_update": (bk.apply_update, _update),
}  # fmt: skip
"""Every public function, with arguments that are right for it."""

_MADE_OF = {"local_conv": "local_conv_forward", "invert": "refine_inverse"}


def bodies_of(function: str) -> tuple[str, ...]:
    """The backends that have a body of a public function, or of the op that it calls first."""
    return bk.backends.bodies_of(_MADE_OF.get(function, function))
