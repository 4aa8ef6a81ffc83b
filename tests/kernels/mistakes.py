"""Wrong arguments of every public function: each mistake spoils one argument of a valid call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bpfree_kernels as bk

from .calls import FUNCTIONS, Arguments, bodies_of
from .cases import SMALL
from .mistake import Mistake, replaced
from .mistakes_ekdaa import EKDAA_MISTAKES
from .mistakes_invertible import INVERTIBLE_MISTAKES
from .mistakes_local_conv import LOCAL_CONV_MISTAKES
from .mistakes_signals import SIGNAL_MISTAKES

BATCH, INPUTS, OUTPUTS, CLASSES = SMALL

DRTP = ("drtp_linear_step", "drtp_linear_grad")
CLASSIFIER = ("classifier_forward", "classifier_step", "classifier_grad")
LEARNING = (*DRTP, "classifier_step", "classifier_grad")
"""What learns from labels."""
LAYERS = (*DRTP, *CLASSIFIER, "dense_forward")
"""What takes an input called x."""
STEPS = (
    "drtp_linear_step", "classifier_step", "dense_step", "pepita_linear_step", "local_conv_step",
    "conv_step",
)  # fmt: skip
PARAM_UPDATES = ("apply_update", "orthogonal_update")
UPDATES = (*STEPS, *PARAM_UPDATES)
DENSE_GRADS = ("drtp_linear_grad", "classifier_grad", "dense_grad", "pepita_linear_grad")
GRADS = (*DENSE_GRADS, "local_conv_grad", "conv_grad")
WITH_FEEDBACK = (*DRTP, "drtp_signal")
WITH_LABELS = (*DRTP, *CLASSIFIER, "drtp_signal")
WITH_ACTIVATION = (
    *WITH_FEEDBACK, "dense_forward", "pepita_linear_step", "pepita_linear_grad",
    "pepita_difference", "local_conv_forward", "local_conv_feedback",
    "ekdaa_error", "ekdaa_linear_error", "ekdaa_conv_error",
)  # fmt: skip


def _state(change: Callable[[Any, Arguments], None]) -> Callable[[Arguments], Arguments]:
    """Spoil the weight's state (or the parameter's), in a layer or in `apply_update`."""

    def spoil(arguments: Arguments) -> Arguments:
        state = arguments["state"]
        change(getattr(state, "weight", state), arguments)
        return {"state": state}

    return spoil


def _set(field: str, value: Callable[[Any, Arguments], Any]) -> Callable[[Any, Arguments], None]:
    return lambda state, arguments: setattr(state, field, value(state, arguments))


def _param(arguments: Arguments) -> Tensor:
    tensor: Tensor = arguments.get("weight", arguments.get("param"))
    return tensor


def _wild(value: int) -> Callable[[Tensor], Tensor]:
    def spoil(labels: Tensor) -> Tensor:
        labels = labels.clone()
        labels[2] = value
        return labels

    return spoil


MISTAKES = {
    **SIGNAL_MISTAKES,
    **LOCAL_CONV_MISTAKES,
    **EKDAA_MISTAKES,
    **INVERTIBLE_MISTAKES,
    "no classes": Mistake(
        CLASSIFIER,
        lambda a: {"weight": a["weight"][:0], "bias": None, "state": None}
        if "state" in a else {"weight": a["weight"][:0], "bias": None},
        ValueError, ("weight", "class"),
    ),
    # not tensors at all
    "x is a list": Mistake(LAYERS, replaced("x", Tensor.tolist), TypeError, ("x", "list")),
    "x is an array": Mistake(LAYERS, replaced("x", Tensor.numpy), TypeError, ("x", "ndarray")),
    "weight is None": Mistake(
        LAYERS, lambda _: {"weight": None}, TypeError, ("weight", "NoneType")
    ),
    "bias is a number": Mistake(LAYERS, lambda _: {"bias": 0.0}, TypeError, ("bias", "float")),
    "labels is a list": Mistake(
        WITH_LABELS, replaced("labels", Tensor.tolist), TypeError, ("labels", "list")
    ),
    "feedback is an array": Mistake(
        WITH_FEEDBACK, replaced("feedback", Tensor.numpy), TypeError, ("feedback", "ndarray")
    ),
    "grad is None": Mistake(
        ("apply_update",), lambda _: {"grad": None}, TypeError, ("grad", "NoneType")
    ),
    "update is a number": Mistake(
        UPDATES, lambda _: {"update": 0.1}, TypeError, ("update", "float")
    ),
    "update is a torch optimizer": Mistake(
        STEPS, lambda a: {"update": torch.optim.SGD([a["weight"]], lr=0.1)}, TypeError,
        ("update", "SGD"),
    ),
    "state of a parameter for a layer": Mistake(
        STEPS, lambda a: {"state": a["state"].weight}, TypeError, ("state", "ParamState")
    ),
    "state of a layer for a parameter": Mistake(
        PARAM_UPDATES, lambda a: {"state": bk.LayerState(a["state"], bk.ParamState())},
        TypeError, ("state", "LayerState"),
    ),
    # dtypes
    "x of integers": Mistake(LAYERS, replaced("x", Tensor.long), TypeError, ("x", "torch.int64")),
    "x half on the CPU": Mistake(
        LAYERS, replaced("x", Tensor.half), TypeError, ("x", "cpu", "float32", "torch.float16")
    ),
    "x complex": Mistake(LAYERS, replaced("x", Tensor.cfloat), TypeError, ("x", "complex64")),
    "x sparse": Mistake(
        LAYERS, replaced("x", Tensor.to_sparse), (TypeError, ValueError), ("x", "sparse")
    ),
    "weight of another dtype": Mistake(
        LAYERS, replaced("weight", Tensor.double), TypeError, ("weight", "x", "float32", "float64")
    ),
    "bias of another dtype": Mistake(
        LAYERS, replaced("bias", Tensor.double), TypeError, ("bias", "x", "float32", "float64")
    ),
    "feedback of another dtype": Mistake(
        WITH_FEEDBACK, replaced("feedback", Tensor.double), TypeError,
        ("feedback", "float32", "float64"),
    ),
    "labels of floats": Mistake(
        WITH_LABELS, replaced("labels", Tensor.float), TypeError,
        ("labels", "int32", "int64", "float32"),
    ),
    "labels of bytes": Mistake(
        WITH_LABELS, lambda a: {"labels": a["labels"].byte()}, TypeError, ("labels", "uint8")
    ),
    "z of integers": Mistake(
        ("drtp_signal",), replaced("z", Tensor.long), TypeError, ("z", "int64")
    ),
    "param of integers": Mistake(
        ("apply_update",), replaced("param", Tensor.long), TypeError, ("param", "int64")
    ),
    "grad of another dtype": Mistake(
        ("apply_update",), replaced("grad", Tensor.double), TypeError,
        ("grad", "param", "float32", "float64"),
    ),
    # shapes
    "x a vector": Mistake(
        LAYERS, lambda a: {"x": a["x"][0]}, ValueError, ("x", "[batch, in]", "(7,)")
    ),
    "x not flat": Mistake(LAYERS, lambda a: {"x": a["x"][None]}, ValueError, ("x", "(1, 5, 7)")),
    "weight a vector": Mistake(
        LAYERS, lambda a: {"weight": a["weight"][0]}, ValueError, ("weight", "[out, in]", "(7,)")
    ),
    "weight transposed": Mistake(
        LAYERS, lambda a: {"weight": a["weight"].t()}, ValueError, ("weight", "(7, 6)")
    ),
    "bias too long": Mistake(
        LAYERS, lambda _: {"bias": torch.zeros(7)}, ValueError, ("bias", "(6,)", "(7,)")
    ),
    "bias a column": Mistake(
        LAYERS, lambda a: {"bias": a["bias"][:, None]}, ValueError, ("bias", "(6,)", "(6, 1)")
    ),
    "feedback transposed": Mistake(
        WITH_FEEDBACK, lambda a: {"feedback": a["feedback"].t()}, ValueError,
        ("feedback", "(6, 6)", "(6, 3)"),
    ),
    "feedback of no class": Mistake(
        WITH_FEEDBACK, lambda a: {"feedback": a["feedback"][:0]}, ValueError, ("feedback", "(0, 6)")
    ),
    "feedback without dimensions": Mistake(
        WITH_FEEDBACK, lambda _: {"feedback": torch.tensor(1.0)}, ValueError, ("feedback", "()")
    ),
    "labels one-hot": Mistake(
        WITH_LABELS, lambda _: {"labels": torch.eye(5, dtype=torch.int64)}, ValueError,
        ("labels", "(5,)", "(5, 5)"),
    ),
    "labels too few": Mistake(
        WITH_LABELS, lambda a: {"labels": a["labels"][1:]}, ValueError, ("labels", "(5,)", "(4,)")
    ),
    "empty batch": Mistake(
        LEARNING, lambda a: {"x": a["x"][:0], "labels": a["labels"][:0]}, ValueError, ("x", "(0, 7)")
    ),
    "z a vector": Mistake(
        ("drtp_signal",), lambda a: {"z": a["z"][0]}, ValueError, ("z", "[batch, ...]", "(6,)")
    ),
    "grad of another shape": Mistake(
        ("apply_update",), lambda a: {"grad": a["grad"].t()}, ValueError,
        ("grad", "(4, 5)", "(5, 4)"),
    ),
    # label values
    "label too large": Mistake(
        WITH_LABELS, replaced("labels", _wild(6)), IndexError, ("labels", "[0, ", "6 at position"),
    ),
    "label negative": Mistake(
        WITH_LABELS, replaced("labels", _wild(-1)), IndexError, ("labels", "-1 at position 2")
    ),
    # devices
    "weight elsewhere": Mistake(
        LAYERS, lambda a: {"weight": a["weight"].to("meta")}, ValueError, ("weight", "cpu", "meta")
    ),
    "feedback elsewhere": Mistake(
        WITH_FEEDBACK, lambda a: {"feedback": a["feedback"].to("meta")}, ValueError,
        ("feedback", "cpu", "meta"),
    ),
    "labels elsewhere": Mistake(
        WITH_LABELS, lambda a: {"labels": a["labels"].to("meta")}, ValueError,
        ("labels", "cpu", "meta"),
    ),
    "grad elsewhere": Mistake(
        ("apply_update",), lambda a: {"grad": a["grad"].to("meta")}, ValueError,
        ("grad", "cpu", "meta"),
    ),
    # names and numbers
    "unknown activation": Mistake(
        WITH_ACTIVATION, lambda _: {"activation": "gelu"}, ValueError,
        ("activation", "tanh", "hardtanh", "'gelu'"),
    ),
    "slope without meaning": Mistake(
        WITH_ACTIVATION, lambda _: {"slope": 0.1}, ValueError, ("slope", "'tanh'", "0.1")
    ),
    "slope negative": Mistake(
        WITH_ACTIVATION, lambda _: {"activation": "leaky_relu", "slope": -0.1}, ValueError,
        ("slope", "positive", "-0.1"),
    ),
    "slope not a number": Mistake(
        WITH_ACTIVATION, lambda _: {"activation": "hardtanh", "slope": float("nan")}, ValueError,
        ("slope", "positive", "nan"),
    ),
    "unknown loss": Mistake(
        CLASSIFIER, lambda _: {"loss": "nll"}, ValueError,
        ("loss", "ce", "bce", "mse", "hinge", "'nll'"),
    ),
    "margin without meaning": Mistake(
        CLASSIFIER, lambda _: {"margin": 1.0}, ValueError, ("margin", "'ce'", "1.0")
    ),
    "weight of other classes without meaning": Mistake(
        CLASSIFIER, lambda _: {"loss": "bce", "off_class": 0.5}, ValueError,
        ("off_class", "'bce'", "0.5"),
    ),
    "margin negative": Mistake(
        CLASSIFIER, lambda _: {"loss": "hinge", "margin": -1.0}, ValueError,
        ("margin", "not negative", "-1.0"),
    ),
    "weight of other classes not a number": Mistake(
        CLASSIFIER, lambda _: {"loss": "hinge", "off_class": float("nan")}, ValueError,
        ("off_class", "finite", "nan"),
    ),
    "unknown backend": Mistake(
        tuple(FUNCTIONS), lambda _: {"backend": "xpu"}, ValueError,
        ("backend", "cpp", "triton", "cuda", "reference", "'xpu'"),
    ),
    **{f"no {backend} body": Mistake(
        tuple(name for name in FUNCTIONS if backend not in bodies_of(name)),
        lambda _, backend=backend: {"backend": backend}, ValueError,
        ("backend", f"cpp, {other}, reference", repr(backend)),
    ) for backend, other in (("cuda", "triton"), ("triton", "cuda"))},
    "lr of two numbers": Mistake(
        UPDATES, lambda _: {"update": bk.Adam(torch.tensor([0.1, 0.2]))},
        ValueError, ("lr", "(2,)"),
    ),
    "lr of an integer tensor": Mistake(
        UPDATES, lambda _: {"update": bk.Adam(torch.tensor(1))},
        (TypeError, ValueError), ("lr", "int64"),
    ),
    "lr of half precision": Mistake(
        UPDATES, lambda _: {"update": bk.Adam(torch.tensor(0.1).half())}, (TypeError, ValueError),
        ("lr", "float16"),
    ),
    "lr elsewhere": Mistake(
        UPDATES, lambda _: {"update": bk.Adam(torch.tensor(0.1, device="meta"))},
        ValueError, ("lr", "meta"),
    ),
    # state
    "no state": Mistake(
        UPDATES, lambda _: {"state": None}, ValueError, (".m", "missing", "Adam")
    ),
    "no second moment": Mistake(
        UPDATES, _state(_set("v", lambda _s, _a: None)), ValueError,
        (".v", "missing", "Adam"),
    ),
    "no step": Mistake(
        UPDATES, _state(_set("step", lambda _s, _a: None)), ValueError,
        (".step", "missing", "Adam"),
    ),
    "momentum without a buffer": Mistake(
        UPDATES, lambda _: {"update": bk.SGD(0.1, momentum=0.9), "state": None},
        ValueError, (".m", "missing", "SGD"),
    ),
    "bias without state": Mistake(
        STEPS, lambda a: {"state": bk.LayerState(a["state"].weight, bk.ParamState())}, ValueError,
        ("state.bias.m", "missing"),
    ),
    "moment of another shape": Mistake(
        UPDATES, _state(_set("m", lambda s, _: s.m.transpose(0, -1))), ValueError,
        (".m", "shape"),
    ),
    "moment of another dtype": Mistake(
        UPDATES, _state(_set("v", lambda s, _: s.v.double())), TypeError,
        (".v", "float32", "float64"),
    ),
    "step of two numbers": Mistake(
        UPDATES, _state(_set("step", lambda _s, _a: torch.zeros(2))), ValueError,
        (".step", "one", "(2,)"),
    ),
    "step of integers": Mistake(
        UPDATES, _state(_set("step", lambda _s, _a: torch.tensor(0))), TypeError,
        (".step", "float32", "int64"),
    ),
    "step of half precision": Mistake(
        UPDATES, _state(_set("step", lambda *_: torch.tensor(0.0).half())),
        (TypeError, ValueError), (".step", "float16"),
    ),
    "step elsewhere": Mistake(
        UPDATES,
        _state(_set("step", lambda _s, _a: torch.zeros((), device="meta"))), ValueError,
        (".step", "meta"),
    ),
    # gradient buffers
    "grad_weight of another shape": Mistake(
        DENSE_GRADS, lambda _: {"grad_weight": torch.zeros(7, 6)}, ValueError,
        ("grad_weight", "(6, 7)", "(7, 6)"),
    ),
    "grad_bias of another shape": Mistake(
        DENSE_GRADS, lambda _: {"grad_bias": torch.zeros(7)}, ValueError, ("grad_bias", "(6,)", "(7,)")
    ),
    "grad_weight of another dtype": Mistake(
        GRADS, lambda a: {"grad_weight": a["weight"].double()}, TypeError,
        ("grad_weight", "float32", "float64"),
    ),
    "grad_weight elsewhere": Mistake(
        GRADS, lambda a: {"grad_weight": a["weight"].to("meta")}, ValueError,
        ("grad_weight", "cpu", "meta"),
    ),
    "accumulate into nothing": Mistake(
        GRADS, lambda _: {"accumulate": True}, ValueError, ("accumulate", "grad_weight")
    ),
    "accumulate into half": Mistake(
        GRADS, lambda a: {"accumulate": True, "grad_weight": a["weight"].clone()}, ValueError,
        ("accumulate", "grad_bias"),
    ),
    "grad_bias without a bias": Mistake(
        GRADS, lambda a: {"bias": None, "grad_bias": a["bias"].clone()}, ValueError,
        ("grad_bias", "no bias"),
    ),
    # shared memory
    "weight inside x": Mistake(
        ("drtp_linear_step", "classifier_step"), lambda a: {"x": _param(a)[:BATCH]}, ValueError,
        ("x", "weight", "share memory"),
    ),
    "moment is the weight": Mistake(
        UPDATES, _state(_set("m", lambda _, a: _param(a))), ValueError,
        ("m", "share memory"),
    ),
    "moments are one": Mistake(
        UPDATES, _state(_set("v", lambda s, _: s.m)), ValueError,
        ("m", "v", "share memory"),
    ),
    "grad is the parameter": Mistake(
        ("apply_update",), lambda a: {"grad": a["param"]}, ValueError,
        ("param", "grad", "share memory"),
    ),
    "step count inside the moment": Mistake(
        UPDATES, _state(_set("step", lambda s, _: s.m.view(-1)[0])), ValueError,
        ("step", "share memory"),
    ),
    "one step count for two": Mistake(
        STEPS, lambda a: {"state": bk.LayerState(
            a["state"].weight,
            bk.ParamState(a["state"].bias.m, a["state"].bias.v, a["state"].weight.step),
        )}, ValueError, ("step", "share memory"),
    ),
    "weight expanded": Mistake(
        STEPS, lambda a: {"weight": a["weight"][:1].expand_as(a["weight"])}, ValueError,
        ("weight", "expanded"),
    ),
    "param overlaps itself": Mistake(
        ("apply_update",), lambda _: {"param": torch.zeros(20).as_strided((4, 5), (1, 1))},
        ValueError, ("param", "overlap"),
    ),
    "grad_weight is the weight": Mistake(
        GRADS, lambda a: {"grad_weight": a["weight"]}, ValueError,
        ("grad_weight", "weight", "share memory"),
    ),
    "grad_weight expanded": Mistake(
        GRADS, lambda a: {"grad_weight": torch.zeros_like(a["weight"][:1]).expand_as(a["weight"])},
        ValueError, ("grad_weight", "expanded"),
    ),
    "feedback inside the weight": Mistake(
        ("drtp_linear_step",),
        lambda a: {"feedback": a["weight"].view(-1)[: CLASSES * OUTPUTS].view(CLASSES, OUTPUTS)},
        ValueError, ("feedback", "weight", "share memory"),
    ),
}  # fmt: skip
