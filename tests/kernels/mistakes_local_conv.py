"""What can be wrong in a call of a locally connected layer.

What it shares with the other ops (update rules, states, activations) is in `mistakes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bpfree_kernels as bk

from .calls import Arguments
from .mistake import Mistake, geometry_mistakes, given, in_memory_of, kinds, replaced

WITH_X = ("local_conv", "local_conv_forward", "local_conv_step", "local_conv_grad")
WITH_SIGNAL = ("local_conv_feedback", "local_conv_step", "local_conv_grad")
ALL = (*WITH_X, "local_conv_feedback")
STEP, GRAD, FEEDBACK = ("local_conv_step",), ("local_conv_grad",), ("local_conv_feedback",)
MASKED = (
    ("mask", ("local_conv", "local_conv_grad")), ("weight_mask", STEP), ("feedback_mask", STEP),
)  # fmt: skip


def _size(value: Any, error: type[Exception], *words: str) -> dict[str, Mistake]:
    wrong = Mistake(FEEDBACK, given("input_size", value), error, ("input_size", *words))
    return {f"input_size={value!r}": wrong}


GEOMETRY: dict[str, Mistake] = {
    **geometry_mistakes(ALL),
    "groups that do not divide the outputs": Mistake(
        ALL, given("groups", 4), ValueError, ("weight", "4", "groups", "got 6")
    ),
    "groups of other channels": Mistake(
        WITH_X, given("groups", 2), ValueError, ("x", "14 channels", "2 groups", "got 7")
    ),
    "groups of another gate": Mistake(
        FEEDBACK, given("groups", 2), ValueError, ("gate", "(5, 14, 3, 2)", "(5, 7, 3, 2)")
    ),
    "padding that gives other positions": Mistake(
        ALL, given("padding", (1, 1)), ValueError, ("weight", "2 x 1", "3 x 2", "2 x 3")
    ),
    "a window larger than the map": Mistake(
        ALL, given("dilation", (1, 2)), ValueError, ("(3, 2)", "smaller", "(2, 2)", "(1, 2)")
    ),
    "a window of nothing": Mistake(
        ALL, lambda a: {"weight": a["weight"][:, :, :0]}, ValueError, ("kernel", "0 x 2")
    ),
    "a map of another size": Mistake(
        ("local_conv", "local_conv_forward"), lambda a: {"x": a["x"][:, :, :1]}, ValueError,
        ("weight", "2 x 1", "1 x 2", "1 x 1"),
    ),
    "input_size of another map": Mistake(
        FEEDBACK, given("input_size", (3, 4)), ValueError, ("weight", "2 x 1", "3 x 4", "2 x 3")
    ),
    **_size((3,), ValueError, "(3,)"),
    **_size((-3, 2), ValueError, "(-3, 2)"),
    **_size((3.0, 2), TypeError, "int", "(3.0, 2)"),
}  # fmt: skip


def _mask_mistakes(name: str, functions: tuple[str, ...]) -> dict[str, Mistake]:
    return {
        f"{name} of numbers": Mistake(
            functions, replaced(name, Tensor.float), TypeError, (name, "bool", "float32")
        ),
        f"{name} of bytes": Mistake(
            functions, replaced(name, Tensor.byte), TypeError, (name, "bool", "uint8")
        ),
        f"{name} is True": Mistake(functions, given(name, True), TypeError, (name, "bool")),
        f"{name} of one position": Mistake(
            functions, lambda a: {name: a[name][:1, :1]}, ValueError,
            (name, "(2, 1, 2, 2, 7, 6)", "(1, 1, 2, 2, 7, 6)"),
        ),
        f"{name} elsewhere": Mistake(
            functions, replaced(name, lambda t: t.to("meta")), ValueError, (name, "cpu", "meta")
        ),
        f"{name} sparse": Mistake(
            functions, replaced(name, Tensor.to_sparse), ValueError, (name, "sparse")
        ),
    }  # fmt: skip


def _sharing() -> dict[str, Mistake]:
    found = {
        f"{name} inside {other}": Mistake(
            STEP, in_memory_of(name, other), ValueError, (name, other, "share memory")
        )
        for other in ("weight", "feedback")
        for name in ("signal", "x", "weight_mask", "feedback_mask", "bias")
    }
    for name in ("signal", "x", "weight", "bias", "mask"):
        found[f"grad_weight in the memory of {name}"] = Mistake(
            GRAD,
            lambda a, name=name: in_memory_of(name, "grad_weight")(
                {**a, "grad_weight": torch.zeros_like(a["weight"])}
            ),
            ValueError, (name, "grad_weight", "share memory"),
        )  # fmt: skip
    return found


def _spoilt_state(field: str, value: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    def spoil(arguments: Arguments) -> Arguments:
        state = arguments["feedback_state"]
        setattr(state, field, value(getattr(state, field)))
        return {"feedback_state": state}

    return spoil


LEARNING_FEEDBACK: dict[str, Mistake] = {
    "feedback is the weight": Mistake(
        STEP, lambda a: {"feedback": a["weight"]}, ValueError,
        ("weight", "feedback", "share memory"),
    ),
    "feedback expanded": Mistake(
        STEP, lambda a: {"feedback": a["feedback"][:1].expand_as(a["weight"])}, ValueError,
        ("feedback", "expanded"),
    ),
    "feedback transposed, local": Mistake(
        STEP, lambda a: {"feedback": a["feedback"].transpose(4, 5)}, ValueError,
        ("feedback", "weight", "(2, 1, 2, 2, 7, 6)", "(2, 1, 2, 2, 6, 7)"),
    ),
    "feedback of another dtype, local": Mistake(
        STEP, replaced("feedback", Tensor.double), TypeError, ("feedback", "float32", "float64")
    ),
    "feedback is a list": Mistake(
        STEP, replaced("feedback", Tensor.tolist), TypeError, ("feedback", "list")
    ),
    "a mask of no feedback": Mistake(
        STEP, lambda _: {"feedback": None, "feedback_state": None}, ValueError,
        ("feedback_mask", "feedback", "None"),
    ),
    "state of no feedback": Mistake(
        STEP, lambda _: {"feedback": None, "feedback_mask": None}, ValueError,
        ("feedback_state", "feedback", "None"),
    ),
    "feedback without state": Mistake(
        STEP, given("feedback_state", None), ValueError, ("feedback_state.m", "missing", "Adam")
    ),
    "state of a layer for feedback": Mistake(
        STEP, lambda a: {"feedback_state": a["state"]}, TypeError, ("ParamState", "LayerState")
    ),
    "feedback without second moment": Mistake(
        STEP, _spoilt_state("v", lambda _: None), ValueError, ("feedback_state.v", "missing")
    ),
    "moment of feedback of another shape": Mistake(
        STEP, _spoilt_state("m", lambda m: m[:1]), ValueError,
        ("feedback_state.m", "(2, 1, 2, 2, 7, 6)", "(1, 1, 2, 2, 7, 6)"),
    ),
    "one state for weight and feedback": Mistake(
        STEP, lambda a: {"feedback_state": a["state"].weight}, ValueError,
        ("state.weight", "feedback_state", "share memory"),
    ),
    "one step count for weight and feedback": Mistake(
        STEP, lambda a: {"feedback_state": bk.ParamState(
            a["feedback_state"].m, a["feedback_state"].v, a["state"].weight.step
        )}, ValueError, ("step", "share memory"),
    ),
}  # fmt: skip


LOCAL_CONV_MISTAKES: dict[str, Mistake] = {
    **{f"{name}, local": entry for name, entry in {
        **kinds(WITH_X, "weight", "x"),
        **kinds(FEEDBACK, "weight", "signal"),
        **kinds(WITH_X, "bias", "x", none=False),
        **kinds(("local_conv_step", "local_conv_grad"), "signal", "x"),
        **kinds(FEEDBACK, "gate", "signal", none=False),
    }.items()},
    **{f"{name} {what}": entry for functions, name in ((WITH_X, "x"), (FEEDBACK, "signal"))
       for what, entry in {
        "a list, local": Mistake(
            functions, replaced(name, Tensor.tolist), TypeError, (name, "list")
        ),
        "of integers, local": Mistake(
            functions, replaced(name, Tensor.long), TypeError, (name, "int64")
        ),
        "half on the CPU, local": Mistake(
            functions, replaced(name, Tensor.half), TypeError, (name, "cpu", "float16")
        ),
    }.items()},
    # shapes
    "x one map": Mistake(
        WITH_X, lambda a: {"x": a["x"][0]}, ValueError,
        ("x", "[batch, in, height, width]", "(7, 3, 2)"),
    ),
    "x of other channels": Mistake(
        WITH_X, lambda a: {"x": a["x"][:, 1:]}, ValueError, ("x", "7 channels", "got 6")
    ),
    "weight of a convolution": Mistake(
        ALL, lambda a: {"weight": a["weight"][0, 0]}, ValueError,
        ("weight", "[rows, columns, kernel_h, kernel_w, in/groups, out]", "(2, 2, 7, 6)"),
    ),
    "bias of a convolution": Mistake(
        WITH_X, lambda a: {"bias": a["bias"][0, 0]}, ValueError,
        ("bias", "[rows, columns, out]", "(2, 1, 6)", "(6,)"),
    ),
    "signal of other samples": Mistake(
        STEP + GRAD, lambda a: {"signal": a["signal"][1:]}, ValueError,
        ("signal", "(5, 6, 2, 1)", "(4, 6, 2, 1)"),
    ),
    "signal with its channels last": Mistake(
        WITH_SIGNAL, lambda a: {"signal": a["signal"].permute(0, 2, 3, 1)}, ValueError,
        ("signal", "[batch, out, rows, columns]", "(5, 6, 2, 1)", "(5, 2, 1, 6)"),
    ),
    "signal flat": Mistake(
        STEP + GRAD, lambda a: {"signal": a["signal"].flatten(1)}, ValueError,
        ("signal", "(5, 6, 2, 1)", "(5, 12)"),
    ),
    "gate of other samples": Mistake(
        FEEDBACK, lambda a: {"gate": a["gate"][1:]}, ValueError,
        ("gate", "[batch, in, height, width]", "(5, 7, 3, 2)", "(4, 7, 3, 2)"),
    ),
    "gate of the layer's own field": Mistake(
        FEEDBACK, lambda a: {"gate": a["signal"]}, ValueError,
        ("gate", "(5, 7, 3, 2)", "(5, 6, 2, 1)"),
    ),
    "empty batch, local": Mistake(
        STEP, lambda a: {name: a[name][:0] for name in ("signal", "x")}, ValueError,
        ("x", "at least one", "(0, 7, 3, 2)"),
    ),
    "grad_weight of another layer": Mistake(
        GRAD, given("grad_weight", torch.zeros(2, 1, 2, 2, 6, 7)), ValueError,
        ("grad_weight", "(2, 1, 2, 2, 7, 6)", "(2, 1, 2, 2, 6, 7)"),
    ),
    "grad_bias of another layer": Mistake(
        GRAD, given("grad_bias", torch.zeros(6)), ValueError, ("grad_bias", "(2, 1, 6)", "(6,)")
    ),
    **{name: entry for of_mask in MASKED for name, entry in _mask_mistakes(*of_mask).items()},
    **GEOMETRY,
    **LEARNING_FEEDBACK,
    **_sharing(),
}  # fmt: skip
