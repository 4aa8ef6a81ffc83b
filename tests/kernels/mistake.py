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
