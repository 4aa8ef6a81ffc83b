"""The losses of an output layer, by name, and the hinge loss's two options.

What each computes is in the table of `bpfree_kernels.ops.classifier`.
"""

from __future__ import annotations

import math

LOSSES = ("ce", "bce", "mse", "hinge")
"""Every loss name of an output layer."""

DEFAULT_MARGIN = 1.0
"""Margin of the hinge loss."""


def check_loss(loss: object) -> None:
    """Raise ValueError unless `loss` is one of `LOSSES`."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")


def check_hinge(margin: float, off_class: float | None) -> None:
    """Raise ValueError unless a margin, and a weight of the other classes, make a hinge loss."""
    for name, value in (("margin", margin), ("off_class", off_class)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}.")


def resolve_loss(
    loss: str, margin: float | None, off_class: float | None, classes: int
) -> tuple[str, float, float]:
    """Check a loss and its options and fill in the defaults.

    Args:
        loss: one of `LOSSES`.
        margin: the margin of ``hinge``; ``None`` takes 1.
        off_class: μ, the weight of the other classes in ``hinge``; ``None`` takes
            1 / (classes − 1), or 0 for a single class, beside which there is no other.
        classes: number of classes.

    Returns:
        The name, margin and μ that the bodies get (0 and 0 for losses without).

    Raises:
        ValueError: unknown name, an option for a loss that has none, or one that is negative or
            not finite.
    """
    check_loss(loss)
    if loss != "hinge":
        for name, value in (("margin", margin), ("off_class", off_class)):
            if value is not None:
                raise ValueError(f"{name} has no meaning for loss {loss!r}, got {value}.")
        return loss, 0.0, 0.0
    margin = DEFAULT_MARGIN if margin is None else margin
    check_hinge(margin, off_class)
    if off_class is None:
        off_class = 1 / (classes - 1) if classes > 1 else 0.0
    return loss, float(margin), float(off_class)
