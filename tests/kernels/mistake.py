"""One wrong argument of a call, and how to make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
