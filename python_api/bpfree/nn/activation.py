"""Activations that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree_kernels.activations import resolve_activation


class SaturatedLinear(nn.Module):
    """The saturated linear function of URFB, f(z) = clip(slope · z, −1, 1), of any shape.

    f′(z) = slope where |slope · z| ≤ 1, and 0 elsewhere. Equality keeps the derivative, as in the
    paper's text and the authors' code; `torch.nn.Hardtanh` drops it there, which stops a unit for good
    whose field is exactly ±1.

    Learners know this module: `bpfree.URFB` and `bpfree.FRFB` run it inside their kernels.

    Args:
        slope: factor of the field, positive; the paper has 1, the authors' parameter files 0.5.

    Raises:
        ValueError: a slope that is not positive and finite.
    """

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = resolve_activation("hardtanh", slope)[1]

    def forward(self, z: Tensor) -> Tensor:
        """f(z), shaped like z."""
        return (self.slope * z).clamp(-1, 1)  # clamp keeps the derivative at its bounds

    def extra_repr(self) -> str:
        """The slope, for ``print``."""
        return f"slope={self.slope:g}"


class Signum(nn.Module):
    """f(z) = sign(z): −1, 0 or 1, of any shape; NaN stays NaN.

    f′ is 0 everywhere, so that no gradient gets through it: rules that use no derivative can train the layers
    below, such as `bpfree.EKDAA`.
    """

    def forward(self, z: Tensor) -> Tensor:
        """f(z), shaped like z."""
        return torch.where(z.isnan(), z, z.sign())  # torch's own makes 0 of NaN
