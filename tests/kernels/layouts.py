"""The same values in awkward memory layouts, and what lay around them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Laid:
    """A tensor inside a larger buffer, with what the buffer held before an op ran.

    Attributes:
        view: the values, laid out awkwardly.
        buffer: the memory around them, filled with a value that nothing computes.
    """

    view: Tensor
    buffer: Tensor
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.buffer.clone()

    def check_surroundings(self) -> None:
        """Raise AssertionError if anything but the view's own elements has changed."""
        expected = self.before.clone()
        expected.as_strided(
            self.view.shape, self.view.stride(), self.view.storage_offset()
        ).copy_(self.view)  # fmt: skip
        assert torch.equal(expected, self.buffer), "memory around the tensor was written"


LAYOUTS = ("transposed", "strided", "offset")
"""Memory layouts that are legal in torch: column-major, every second element, off alignment."""


def laid_out(tensor: Tensor, layout: str) -> Laid:
    """The same values in another memory layout, with guard elements around them."""
    shape = tuple(tensor.shape)
    if layout == "transposed":
        buffer = tensor.new_full((*reversed(shape),), 77)
        view = buffer.permute(*reversed(range(tensor.dim())))
    elif layout == "strided":
        buffer = tensor.new_full((*shape[:-1], 2 * shape[-1] + 1), 77)
        view = buffer[..., 1::2]
    else:
        buffer = tensor.new_full((tensor.numel() + 2,), 77)
        view = buffer[1:-1].view(shape)
    view.copy_(tensor)
    return Laid(view, buffer)
