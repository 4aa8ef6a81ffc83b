"""What PEPITA's two passes hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bpfree.differences import Way
from bpfree.stages import Stage


@dataclass(frozen=True, eq=False)
class Kept:
    """What the first pass keeps of a hidden stage.

    Attributes:
        stage: the stage.
        x: input of the layer, [batch, ...].
        z: pre-activation, [batch, ...].
        mask: mask of a dropout that directly follows the activation, with its factor.
        ways: how a difference passes the modules behind that.
    """

    stage: Stage
    x: Tensor
    z: Tensor
    mask: Tensor | None
    ways: tuple[Way, ...]


@dataclass(frozen=True, eq=False)
class Modulation:
    """A change Δx of a layer's input; in the first layer as the error e, with Δx = F e.

    Attributes:
        change: Δx, shaped like the input; with `feedback`, e, [batch, classes].
        feedback: F, [values of a sample, classes], or ``None``.
    """

    change: Tensor
    feedback: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """x + Δx."""
        if self.feedback is None:
            return x + self.change
        return torch.addmm(x.flatten(1), self.change, self.feedback.t()).view(x.shape)

    def through(self, weight: Tensor) -> Tensor:
        """Δz = W Δx, [batch, out], of a dense layer with this weight."""
        if self.feedback is None:
            return self.change @ weight.t()
        # Takes the cheaper of (W F) e and W (F e).
        factors = (self.change, self.feedback.t(), weight.t())
        return cast(Tensor, torch.linalg.multi_dot(factors))

    def written_out(self, x: Tensor) -> Modulation:
        """The same with Δx itself, shaped like x."""
        if self.feedback is None:
            return self
        return Modulation((self.change @ self.feedback.t()).view(x.shape), None)
