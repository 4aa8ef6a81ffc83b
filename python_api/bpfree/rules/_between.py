"""What lies between two layers (pooling, dropout, flattening), run so that a signal can come back.

torch's own autograd carries the signal, through these modules alone: pooling and dropout choose as they did
in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WayBack = Callable[[Tensor], Tensor]
"""Takes the signal at the output of some modules to the signal at their input; works once."""


def run(modules: Sequence[nn.Module], y: Tensor) -> tuple[Tensor, WayBack]:
    """Apply modules one after another.

    Args:
        modules: what a stage has after its activation.
        y: input of the first one, [batch, ...]; stays as it is.

    Returns:
        Output of the last one, and the way back through them.
    """
    if not modules:
        return y, lambda signal: signal
    with torch.enable_grad():
        entered = y.detach().requires_grad_()
        in_place = any(getattr(module, "inplace", False) for module in modules)
        left = entered.clone() if in_place else entered
        for module in modules:
            if isinstance(module, nn.Dropout):
                # What torch draws depends on the order in memory, which is the layer's affair.
                left = left.contiguous()
            left = module(left)

    def back(signal: Tensor) -> Tensor:
        return torch.autograd.grad(left, entered, signal)[0]

    return left.detach(), back
