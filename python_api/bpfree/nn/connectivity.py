"""Which connections of a layer exist: boolean masks shaped like its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from bpfree_kernels import checks
from bpfree_kernels.ops.local_conv import check_mask


def random_connectivity(
    weight: Tensor, fraction: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a mask in which each connection exists with the same probability, independently.

    Args:
        weight: a layer's weight, of any shape.
        fraction: probability that a connection exists, 0 to 1 (the URFB paper's is 0.5).
        generator: where the random numbers come from, torch's own generator by default.

    Returns:
        bool, of the weight's shape, on its device.

    Raises:
        ValueError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}.")
    device = weight.device if generator is None else generator.device
    draws = torch.rand(weight.shape, generator=generator, device=device)
    return (draws < fraction).to(weight.device)


def own_mask(name: str, mask: Tensor | None, weight: Tensor) -> Tensor | None:
    """A layer's own copy of a mask, beside its weight.

    Raises:
        TypeError: a mask that is no boolean tensor.
        ValueError: a mask that is not shaped like the weight.
    """
    if mask is None:
        return None
    checks.tensor(name, mask)
    mask = mask.to(weight.device, copy=True)
    check_mask(name, mask, weight)
    return mask


@torch.no_grad()
def clear_outside(weight: Tensor, mask: Tensor | None) -> None:
    """Set to 0, in place, the weights of connections that do not exist."""
    if mask is not None:
        weight.masked_fill_(~mask, 0)


def masked(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient that is 0 where no connection exists."""
    return gradient if mask is None else gradient.masked_fill(~mask, 0)
