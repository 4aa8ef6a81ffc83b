"""One wrong argument of a call, and how to make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments


@dataclass(frozen=True)
class Mistake:
    """One wrong argument.

    Attributes:
        functions: the public functions that it concerns.
        change: the arguments that differ from a valid call, made from the valid ones.
        error: the exception wanted.
        words: what the message must contain: the argument, what came, what was wanted.
    """

    functions: tuple[str, ...]
    change: Callable[[Arguments], Arguments]
    error: type[Exception] | tuple[type[Exception], ...]
    words: tuple[str, ...]


def replaced(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    """The argument `name`, changed."""
    return lambda arguments: {name: change(arguments[name])}


def given(name: str, value: Any) -> Callable[[Arguments], Arguments]:
    """This value for the argument `name`, whatever the others are."""
    return lambda _: {name: value}


def in_memory_of(name: str, other: str) -> Callable[[Arguments], Arguments]:
    """A tensor that begins where another one that is written begins, both with the values they had."""

    def spoil(arguments: Arguments) -> Arguments:
        tensors = {key: arguments[key] for key in (name, other)}
        buffer = torch.zeros(max(t.nbytes for t in tensors.values()), dtype=torch.uint8)
        return {
            key: buffer[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            for key, t in tensors.items()
        }

    return spoil


def geometry_mistakes(functions: tuple[str, ...]) -> dict[str, Mistake]:
    """Stride, padding, dilation and groups of no convolution; the valid calls have stride (2, 1)."""
    wrong: tuple[tuple[str, Any, type[Exception], tuple[str, ...]], ...] = (
        ("stride", 0, ValueError, ("at least 1", "0")),
        ("stride", (1, 2, 1), ValueError, ("(1, 2, 1)",)),
        ("stride", 1.5, TypeError, ("int", "1.5")),
        ("stride", None, TypeError, ("int", "None")),
        ("stride", True, TypeError, ("int", "True")),
        ("padding", -1, ValueError, ("at least 0", "-1")),
        ("padding", (1,), ValueError, ("(1,)",)),
        ("padding", "full", ValueError, ("'same'", "'valid'", "'full'")),
        ("padding", "same", ValueError, ("stride 1", "(2, 1)")),
        ("padding", (1, 0.5), TypeError, ("int", "(1, 0.5)")),
        ("dilation", (1, 0), ValueError, ("at least 1", "(1, 0)")),
        ("dilation", "2", TypeError, ("int", "'2'")),
        ("groups", 0, ValueError, ("at least 1", "0")),
        ("groups", 1.0, TypeError, ("int", "1.0")),
        ("groups", True, TypeError, ("int", "True")),
    )
    return {
        f"{name}={value!r} of {functions[0]}": Mistake(
            functions, given(name, value), error, (name, *words)
        )
        for name, value, error, words in wrong
    }


def kinds(
    functions: tuple[str, ...], name: str, other: str, *, none: bool = True
) -> dict[str, Mistake]:
    """No tensor, another dtype, another device than `other`'s: for any tensor that is read."""
    found = {
        f"{name} is a list": Mistake(
            functions, replaced(name, Tensor.tolist), TypeError, (name, "list")
        ),
        f"{name} of another dtype than {other}": Mistake(
            functions, replaced(name, Tensor.double), TypeError,
            (name, other, "float32", "float64"),
        ),
        f"{name} elsewhere than {other}": Mistake(
            functions, replaced(name, lambda t: t.to("meta")), ValueError, (name, other, "cpu", "meta")
        ),
        f"{name} sparse": Mistake(
            functions, replaced(name, Tensor.to_sparse), ValueError, (name, "sparse")
        ),
    }  # fmt: skip
    if none:
        found[f"{name} is None"] = Mistake(
            functions, lambda _: {name: None}, TypeError, (name, "NoneType")
        )
    return found
