"""Maps [batch, channels, height, width] and their order in memory: channels first or last."""

from __future__ import annotations

import torch
from torch import Tensor


def map_order(maps: Tensor) -> torch.memory_format:
    """Whether maps lie with the channels last in memory, or first (also if both would be true)."""
    if maps.dim() != 4 or maps.is_contiguous():
        return torch.contiguous_format
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def as_maps(maps: Tensor) -> Tensor:
    """The same maps without gaps: as they are if the channels lie first or last, else with them first."""
    return maps.contiguous(memory_format=map_order(maps))


def like_maps(maps: Tensor, other: Tensor) -> Tensor:
    """Maps in the order in memory of other maps."""
    order = map_order(other)
    if maps.numel() == 0:  # contiguous by any strides, as torch sees it
        return torch.empty_like(maps, memory_format=order)
    return maps.contiguous(memory_format=order)
