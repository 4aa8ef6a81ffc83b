"""What can be wrong in a call of EKDAA's ops: errors, convolutions that learn, weights beside a layer's own.

What they share with the other ops (update rules, states, activations) is in `mistakes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bpfree_kernels as bk

from .calls import Arguments
from .mistake import Mistake, geometry_mistakes, given, in_memory_of, kinds, replaced

STEP, GRAD = ("conv_step",), ("conv_grad",)
CONV = STEP + GRAD
ERROR, LINEAR, OF_CONV = ("ekdaa_error",), ("ekdaa_linear_error",), ("ekdaa_conv_error",)
THROUGH = LINEAR + OF_CONV
POOLED = ERROR + OF_CONV
ERRORS = ERROR + LINEAR + OF_CONV
BESIDE = ("conv_step", "dense_step")
"""What has a weight that learns beside the layer's own, and no masks."""


def _named(what: str, entries: dict[str, Mistake]) -> dict[str, Mistake]:
    return {f"{name}, {what}": entry for name, entry in entries.items()}


LAYER: dict[str, Mistake] = {
    **kinds(CONV, "weight", "x"),
    **kinds(CONV, "bias", "x", none=False),
    **kinds(CONV, "signal", "x"),
    "x a list": Mistake(CONV, replaced("x", Tensor.tolist), TypeError, ("x", "list")),
    "x of integers": Mistake(CONV, replaced("x", Tensor.long), TypeError, ("x", "int64")),
    "x half on the CPU": Mistake(
        CONV, replaced("x", Tensor.half), TypeError, ("x", "cpu", "float16")
    ),
    "x one map": Mistake(
        CONV, lambda a: {"x": a["x"][0]}, ValueError,
        ("x", "[batch, in, height, width]", "(7, 3, 2)"),
    ),
    "x of other channels": Mistake(
        CONV, lambda a: {"x": a["x"][:, 1:]}, ValueError, ("weight", "7 channels", "input has 6")
    ),
    "x of another size": Mistake(
        CONV, lambda a: {"x": a["x"][:, :, :1]}, ValueError,
        ("signal", "(5, 6, 1, 1)", "(5, 6, 2, 1)"),
    ),
    "weight of a dense layer": Mistake(
        CONV, lambda a: {"weight": a["weight"][:, :, 0, 0]}, ValueError,
        ("weight", "[out, in/groups, kernel_h, kernel_w]", "(6, 7)"),
    ),
    "weight with in before out": Mistake(
        CONV, lambda a: {"weight": a["weight"].transpose(0, 1)}, ValueError,
        ("weight", "(7, 6, 3, 2)", "6 channels", "input has 7"),
    ),
    "weight without a window": Mistake(
        CONV, lambda a: {"weight": a["weight"][:, :, :0]}, ValueError, ("kernel", "0 x 2")
    ),
    "bias of positions": Mistake(
        CONV, lambda a: {"bias": a["bias"][:, None, None]}, ValueError,
        ("bias", "(6,)", "(6, 1, 1)"),
    ),
    "signal of other samples": Mistake(
        CONV, lambda a: {"signal": a["signal"][1:]}, ValueError,
        ("signal", "(5, 6, 2, 1)", "(4, 6, 2, 1)"),
    ),
    "signal with its channels last": Mistake(
        CONV, lambda a: {"signal": a["signal"].permute(0, 2, 3, 1)}, ValueError,
        ("signal", "[batch, out, out_height, out_width]", "(5, 6, 2, 1)", "(5, 2, 1, 6)"),
    ),
    "signal of another padding": Mistake(
        CONV, given("padding", 1), ValueError, ("signal", "(5, 6, 2, 3)", "(5, 6, 2, 1)")
    ),
    "empty batch": Mistake(
        STEP, lambda a: {name: a[name][:0] for name in ("signal", "x")}, ValueError,
        ("x", "at least one", "(0, 7, 3, 2)"),
    ),
    "groups of other channels": Mistake(
        CONV, given("groups", 2), ValueError, ("weight", "2 groups", "14 channels", "input has 7")
    ),
    "groups that do not divide the outputs": Mistake(
        CONV, lambda a: {"groups": 4, "x": a["x"].repeat(1, 4, 1, 1)}, ValueError,
        ("weight", "multiple of 4", "groups", "got 6"),
    ),
    "a window larger than the map": Mistake(
        CONV, given("dilation", (1, 2)), ValueError, ("(3, 2)", "smaller", "(1, 2)")
    ),
    "grad_weight of another layer": Mistake(
        GRAD, given("grad_weight", torch.zeros(6, 7, 2, 3)), ValueError,
        ("grad_weight", "(6, 7, 3, 2)", "(6, 7, 2, 3)"),
    ),
    "grad_bias of another layer": Mistake(
        GRAD, given("grad_bias", torch.zeros(7)), ValueError, ("grad_bias", "(6,)", "(7,)")
    ),
    **geometry_mistakes(CONV),
    **{f"{name} inside the {other}": Mistake(
        STEP, in_memory_of(name, other), ValueError, (name, other, "share memory")
    ) for other in ("weight", "feedback") for name in ("signal", "x", "bias")},
    **{f"grad_weight in the memory of {name}": Mistake(
        GRAD,
        lambda a, name=name: in_memory_of(name, "grad_weight")(
            {**a, "grad_weight": torch.zeros_like(a["weight"])}
        ),
        ValueError, (name, "grad_weight", "share memory"),
    ) for name in ("signal", "x", "weight", "bias")},
}  # fmt: skip


def _spoilt_state(field: str, value: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    def spoil(arguments: Arguments) -> Arguments:
        state = arguments["feedback_state"]
        setattr(state, field, value(getattr(state, field)))
        return {"feedback_state": state}

    return spoil


FEEDBACK: dict[str, Mistake] = {
    **kinds(BESIDE, "feedback", "weight", none=False),
    "feedback is the weight": Mistake(
        BESIDE, lambda a: {"feedback": a["weight"]}, ValueError,
        ("weight", "feedback", "share memory"),
    ),
    "feedback expanded": Mistake(
        BESIDE, lambda a: {"feedback": a["feedback"][:1].expand_as(a["weight"])}, ValueError,
        ("feedback", "expanded"),
    ),
    "feedback transposed": Mistake(
        BESIDE, lambda a: {"feedback": a["feedback"].transpose(0, 1)}, ValueError,
        ("feedback", "weight", "(6, 7", "(7, 6"),
    ),
    "state of no feedback": Mistake(
        BESIDE, given("feedback", None), ValueError, ("feedback_state", "feedback", "None")
    ),
    "feedback without state": Mistake(
        BESIDE, given("feedback_state", None), ValueError,
        ("feedback_state.m", "missing", "Adam"),
    ),
    "state of a layer for feedback": Mistake(
        BESIDE, lambda a: {"feedback_state": a["state"]}, TypeError, ("ParamState", "LayerState")
    ),
    "feedback without second moment": Mistake(
        BESIDE, _spoilt_state("v", lambda _: None), ValueError, ("feedback_state.v", "missing")
    ),
    "moment of feedback of another shape": Mistake(
        BESIDE, _spoilt_state("m", lambda m: m[:1]), ValueError,
        ("feedback_state.m", "shape", "(6, 7", "(1, 7"),
    ),
    "one state for weight and feedback": Mistake(
        BESIDE, lambda a: {"feedback_state": a["state"].weight}, ValueError,
        ("state.weight", "feedback_state", "share memory"),
    ),
    "one step count for weight and feedback": Mistake(
        BESIDE, lambda a: {"feedback_state": bk.ParamState(
            a["feedback_state"].m, a["feedback_state"].v, a["state"].weight.step
        )}, ValueError, ("step", "share memory"),
    ),
    "feedback inside post": Mistake(
        ("dense_step",), in_memory_of("post", "feedback"), ValueError,
        ("post", "feedback", "share memory"),
    ),
    "feedback inside pre": Mistake(
        ("dense_step",), in_memory_of("pre", "feedback"), ValueError,
        ("pre", "feedback", "share memory"),
    ),
}  # fmt: skip


OF_ERRORS: dict[str, Mistake] = {
    **kinds(ERROR, "change", "z"),
    **kinds(THROUGH, "error", "z"),
    **kinds(THROUGH, "feedback", "z"),
    "z a list": Mistake(ERRORS, replaced("z", Tensor.tolist), TypeError, ("z", "list")),
    "z of integers": Mistake(ERRORS, replaced("z", Tensor.long), TypeError, ("z", "int64")),
    "z half on the CPU": Mistake(
        ERRORS, replaced("z", Tensor.half), TypeError, ("z", "cpu", "float16")
    ),
    "z a vector": Mistake(
        ERROR, lambda _: {"z": torch.zeros(6), "change": torch.zeros(6), "pool": None},
        ValueError, ("z", "[batch, ...]", "(6,)"),
    ),
    "z one sample": Mistake(
        LINEAR, lambda a: {"z": a["z"][0]}, ValueError, ("z", "[batch, in]", "(7,)")
    ),
    "z a map of one sample": Mistake(
        OF_CONV, lambda a: {"z": a["z"][0]}, ValueError,
        ("z", "[batch, in, height, width]", "(7, 6, 5)"),
    ),
    "z flat, though pooled": Mistake(
        ERROR, lambda a: {"z": a["z"].flatten(1)}, ValueError,
        ("z", "[batch, channels, height, width]", "(2, 90)"),
    ),
    "change of another size": Mistake(
        ERROR, lambda a: {"change": a["change"][..., 1:]}, ValueError,
        ("change", "pooled z", "(2, 3, 2, 3)", "(2, 3, 2, 2)"),
    ),
    "change of z's size, though pooled": Mistake(
        ERROR, lambda a: {"change": a["z"]}, ValueError,
        ("change", "pooled z", "(2, 3, 2, 3)", "(2, 3, 5, 6)"),
    ),
    "change pooled, without a pooling": Mistake(
        ERROR, given("pool", None), ValueError, ("change", "z", "(2, 3, 5, 6)", "(2, 3, 2, 3)")
    ),
    "error of other samples": Mistake(
        THROUGH, lambda a: {"error": a["error"][1:]}, ValueError, ("error", "(5, 6", "(4, 6")
    ),
    "error of other units": Mistake(
        THROUGH, lambda a: {"error": a["error"][:, 1:]}, ValueError, ("error", "(5, 6", "(5, 5")
    ),
    "error of another size": Mistake(
        OF_CONV, lambda a: {"error": a["error"].repeat(1, 1, 1, 2)}, ValueError,
        ("error", "[batch, out, out_height, out_width]", "(5, 6, 2, 1)", "(5, 6, 2, 2)"),
    ),
    "feedback transposed": Mistake(
        LINEAR, lambda a: {"feedback": a["feedback"].t()}, ValueError,
        ("feedback", "[out, in]", "(7, 7)", "(7, 6)"),
    ),
    "feedback a vector": Mistake(
        LINEAR, lambda a: {"feedback": a["feedback"][0]}, ValueError,
        ("feedback", "[out, in]", "(7,)"),
    ),
    "feedback a matrix": Mistake(
        OF_CONV, lambda a: {"feedback": a["feedback"][..., 0, 0]}, ValueError,
        ("feedback", "[out, in/groups, kernel_h, kernel_w]", "(6, 7)"),
    ),
    "feedback with in before out": Mistake(
        OF_CONV, lambda a: {"feedback": a["feedback"].transpose(0, 1)}, ValueError,
        ("feedback", "(7, 6, 3, 2)", "6 channels", "input has 7"),
    ),
    "groups of other channels": Mistake(
        OF_CONV, given("groups", 2), ValueError, ("feedback", "2 groups", "14", "input has 7")
    ),
    "a pooling that gives another map": Mistake(
        OF_CONV, given("pool", None), ValueError, ("error", "(5, 6, 3, 4)", "(5, 6, 2, 1)")
    ),
    "a pooling larger than the map": Mistake(
        POOLED, given("pool", bk.MaxPool(9)), ValueError, ("smaller", "(9, 9)")
    ),
    "pool is a number": Mistake(POOLED, given("pool", 2), TypeError, ("pool", "MaxPool", "int")),
    "pool is torch's": Mistake(
        POOLED, given("pool", torch.nn.MaxPool2d(2)), TypeError, ("pool", "MaxPool", "MaxPool2d")
    ),
    "unknown up-sampling": Mistake(
        POOLED, given("upsample", "bicubic"), ValueError,
        ("upsample", "argmax", "nearest", "average", "bilinear", "'bicubic'"),
    ),
    "no up-sampling": Mistake(
        POOLED, given("upsample", None), ValueError, ("upsample", "argmax", "None")
    ),
    **{f"bilinear in {backend}": Mistake(
        POOLED, lambda _, backend=backend: {"upsample": "bilinear", "backend": backend},
        ValueError, ("backend", "'reference'", "bilinear", repr(backend)),
    ) for backend in ("cpp", "triton")},
    **geometry_mistakes(OF_CONV),
}  # fmt: skip


OF_NORMS: dict[str, Mistake] = {
    f"max_norm={value}": Mistake(
        ("apply_update",), given("max_norm", value), ValueError,
        ("max_norm", "positive and finite", str(value)),
    )
    for value in (0.0, -1.0, float("inf"), float("nan"))
}  # fmt: skip


EKDAA_MISTAKES: dict[str, Mistake] = {
    **_named("of a convolution", LAYER),
    **_named("beside a weight", FEEDBACK),
    **_named("of an error", OF_ERRORS),
    **OF_NORMS,
}
