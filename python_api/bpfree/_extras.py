"""What happens when a package of the extra ``[train]`` is not installed: one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package that only the extra ``[train]`` installs is missing."""


@contextmanager
def train_extra(purpose: str) -> Iterator[None]:
    """Import packages of the extra ``[train]`` inside this block.

    Args:
        purpose: what the packages are for; begins the sentence that the user gets.

    Raises:
        MissingExtraError: one of them is not installed; says which, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package}: "
            'install it with pip install "bpfree-kernels[train]".'
        ) from error
