"""What can be wrong in a call of an op that is given its signal: dense layers in halves, PEPITA.

What they share with the other ops is in `mistakes`, which takes these up too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments
from .mistake import Mistake, kinds, replaced

DENSE = ("dense_step", "dense_grad")
PEPITA = ("pepita_linear_step", "pepita_linear_grad")
LEARNING = (*DENSE, *PEPITA)
WITH_CHANGE = (*PEPITA, "pepita_difference")


def _inside(name: str, *size: int) -> Callable[[Arguments], Arguments]:
    """A tensor that lies in the weight's memory."""
    count = torch.Size(size).numel()

    def spoil(arguments: Arguments) -> Arguments:
        return {name: arguments["weight"].view(-1)[:count].view(size)}

    return spoil


def _large_inside(name: str, *size: int) -> Callable[[Arguments], Arguments]:
    """The weight at the start of a tensor that may be larger than it."""

    def spoil(arguments: Arguments) -> Arguments:
        buffer = torch.zeros(100)
        weight = buffer[:42].view(6, 7).copy_(arguments["weight"])
        return {"weight": weight, name: buffer[: torch.Size(size).numel()].view(size)}

    return spoil


def _empty(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {name: arguments[name][:0] for name in names}


SIGNAL_MISTAKES: dict[str, Mistake] = {
    **kinds(LEARNING, "weight", "pre"),
    **kinds(LEARNING, "bias", "pre", none=False),
    **kinds(DENSE, "post", "pre"),
    **kinds(PEPITA, "z", "pre"),
    **kinds(PEPITA, "change", "pre"),
    **kinds(PEPITA, "feedback", "pre", none=False),
    **kinds(PEPITA, "mask", "z", none=False),
    **{f"{name}, map": entry for name, entry in {
        **kinds(("pepita_difference",), "change", "z"),
        **kinds(("pepita_difference",), "basis", "z", none=False),
    }.items()},
    "pre is a list": Mistake(LEARNING, replaced("pre", Tensor.tolist), TypeError, ("pre", "list")),
    "pre of integers": Mistake(LEARNING, replaced("pre", Tensor.long), TypeError, ("pre", "int64")),
    "pre half on the CPU": Mistake(
        LEARNING, replaced("pre", Tensor.half), TypeError, ("pre", "cpu", "float32", "float16")
    ),
    "z of integers, map": Mistake(
        ("pepita_difference",), replaced("z", Tensor.long), TypeError, ("z", "int64")
    ),
    # shapes
    "pre a vector": Mistake(
        LEARNING, lambda a: {"pre": a["pre"][0]}, ValueError, ("pre", "[batch, in]", "(7,)")
    ),
    "empty batch, post": Mistake(DENSE, _empty("post", "pre"), ValueError, ("pre", "(0, 7)")),
    "empty batch, z": Mistake(
        PEPITA, _empty("z", "pre", "change", "mask"), ValueError, ("pre", "(0, 7)")
    ),
    "weight transposed, pre": Mistake(
        LEARNING, lambda a: {"weight": a["weight"].t()}, ValueError, ("weight", "(7, 6)")
    ),
    "bias too long, pre": Mistake(
        LEARNING, lambda _: {"bias": torch.zeros(7)}, ValueError, ("bias", "(6,)", "(7,)")
    ),
    "post of fewer samples": Mistake(
        DENSE, lambda a: {"post": a["post"][1:]}, ValueError, ("post", "(5, 6)", "(4, 6)")
    ),
    "post of another layer": Mistake(
        DENSE, lambda a: {"post": a["post"].new_zeros(5, 7)}, ValueError,
        ("post", "[batch, out]", "(5, 6)", "(5, 7)"),
    ),
    "z of fewer samples": Mistake(
        PEPITA, lambda a: {"z": a["z"][1:], "mask": None}, ValueError, ("z", "(5, 6)", "(4, 6)")
    ),
    "change of fewer samples": Mistake(
        WITH_CHANGE, lambda a: {"change": a["change"][1:]}, ValueError,
        ("change", "(5, 3)", "(4, 3)"),
    ),
    "change of the input, with feedback": Mistake(
        PEPITA, lambda _: {"change": torch.zeros(5, 7)}, ValueError,
        ("change", "[batch, classes]", "(5, 3)", "(5, 7)"),
    ),
    "change an error, without feedback": Mistake(
        PEPITA, lambda _: {"feedback": None}, ValueError, ("change", "(5, 7)", "(5, 3)")
    ),
    "feedback of classes and inputs": Mistake(
        PEPITA, lambda a: {"feedback": a["feedback"].t()}, ValueError,
        ("feedback", "[in, classes]", "(7, ", "(3, 7)"),
    ),
    "feedback a vector": Mistake(
        PEPITA, lambda a: {"feedback": a["feedback"][:, 0]}, ValueError,
        ("feedback", "[in, classes]", "(7,)"),
    ),
    "feedback of other classes": Mistake(
        PEPITA, lambda _: {"feedback": torch.zeros(7, 4)}, ValueError,
        ("change", "(5, 4)", "(5, 3)"),
    ),
    "mask of one sample": Mistake(
        PEPITA, lambda a: {"mask": a["mask"][:1]}, ValueError, ("mask", "z", "(5, 6)", "(1, 6)")
    ),
    "mask of booleans": Mistake(
        PEPITA, lambda a: {"mask": a["mask"] > 0}, TypeError, ("mask", "float32", "bool")
    ),
    "z a vector, map": Mistake(
        ("pepita_difference",), lambda a: {"z": a["z"][0]}, ValueError,
        ("z", "[batch, ...]", "(6,)"),
    ),
    "basis of another map": Mistake(
        ("pepita_difference",), lambda _: {"basis": torch.zeros(3, 7)}, ValueError,
        ("basis", "[classes, ...]", "(3, 6)", "(3, 7)"),
    ),
    "basis of other classes": Mistake(
        ("pepita_difference",), lambda _: {"basis": torch.zeros(4, 6)}, ValueError,
        ("basis", "(3, 6)", "(4, 6)"),
    ),
    "an error without a basis": Mistake(
        ("pepita_difference",), lambda _: {"basis": None}, ValueError,
        ("change", "(5, 6)", "(5, 3)"),
    ),
    # shared memory
    "weight inside pre": Mistake(
        ("dense_step", "pepita_linear_step"), _inside("pre", 5, 7), ValueError,
        ("pre", "weight", "share memory"),
    ),
    "weight inside post": Mistake(
        ("dense_step",), _inside("post", 5, 6), ValueError, ("post", "weight", "share memory")
    ),
    **{f"weight inside {name}": Mistake(
        ("pepita_linear_step",), _large_inside(name, *size), ValueError,
        (name, "weight", "share memory"),
    ) for name, size in {"z": (5, 6), "change": (5, 3), "feedback": (7, 3), "mask": (5, 6)}.items()},
    **{f"grad_weight inside {name}": Mistake(
        functions, lambda a, name=name: _shared_gradient(a, name), ValueError,
        ("grad_weight", name, "share memory"),
    ) for functions, name in (
        (("dense_grad", "pepita_linear_grad"), "pre"), (("dense_grad",), "post"),
        (("pepita_linear_grad",), "z"), (("pepita_linear_grad",), "change"),
        (("pepita_linear_grad",), "feedback"), (("pepita_linear_grad",), "mask"),
    )},
}  # fmt: skip


def _shared_gradient(arguments: Arguments, name: str) -> Arguments:
    """A gradient whose memory begins with another tensor of the call."""
    buffer, tensor = torch.zeros(42), arguments[name]
    inside: Any = buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
    return {name: inside, "grad_weight": buffer.view(6, 7)}
