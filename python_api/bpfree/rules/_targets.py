"""GAIT-prop as the paper writes it: targets for every unit, brought down through the inverse layers.

With a = f(z) of all units, the auxiliary ones too, and t_L = a_L − ½ ∂Loss/∂a_L, Loss the batch's sum::

    γ = η √d / ‖t_l − a_l‖                 for each sample, d units in the layer; vanilla: a constant
    u = (1 − γ f′²) ⊙ a_l + γ f′² ⊙ t_l     t_{l−1} = W_l⁻¹ (f⁻¹(u) − b_l)
    m_{l−1} = m_l / γ,   m_L = 1           what γ took away, the update gets back
    δ_l = 2 m_l f′ ⊙ (a_l − t_l)           the gradient of m_l ‖t_l − a_l‖² at z_l

An auxiliary unit's target is its own activation. t and a are nearly equal: in float32 the difference drowns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.nn.invertible import Invertible
from bpfree.rules._inverses import Inverses
from bpfree.rules._layerwise import Passed
from bpfree.rules._products import windows_of
from bpfree.stages import Stage


@dataclass(frozen=True)
class Nudge:
    """How far an output is moved towards its target.

    Attributes:
        eta: η of the normalised form.
        rate: γ of the vanilla form.
        normalised: which of the two.
    """

    eta: float
    rate: float
    normalised: bool

    def of(self, difference: Tensor) -> Tensor:
        """γ of each sample, [batch]; where target and activation are equal, any will do: it is 1.

        Args:
            difference: a − t, [batch, ...].
        """
        flat = difference.flatten(1)
        if not self.normalised:
            return torch.full_like(flat[:, 0], self.rate)
        length = torch.linalg.vector_norm(flat, dim=1)
        scaled = self.eta * math.sqrt(flat.shape[1]) / length
        return torch.where(length > 0, scaled, 1.0)


def target_signals(
    passed: Sequence[Passed],
    output: tuple[Stage, Tensor],
    gradient: Tensor,
    nudge: Nudge,
    inverses: Inverses,
    backend: str | None,
) -> list[Tensor]:
    """δ at every z that is handed on, from the lowest stage that learns to the output.

    Args:
        passed: the hidden stages from the lowest that learns.
        output: the output layer and its input.
        gradient: ∂Loss/∂a of the logits, loss summed over the batch, [batch, classes].
        nudge: γ.
        inverses: of the layers.
        backend: backend of the ops.

    Raises:
        torch.linalg.LinAlgError: a weight without an inverse.
    """
    stage, x = output
    z = _field(stage, x)
    a = stage.activate(z)
    target = a.clone()
    target[:, : stage.outputs] -= gradient / 2
    times = torch.ones_like(a[:, 0])
    signals = [_signal(stage, z, a - target, times)]
    for below in reversed(passed):
        rate = nudge.of(a - target)
        reached = _reconstruct(stage, a, x, target, rate, inverses.exact(stage), backend)
        times = times / rate
        stage, x = below.stage, below.x
        z = _field(stage, x)
        a = stage.activate(z)
        target = a.clone()
        target[:, : stage.outputs] = below.back(reached)
        signals.append(_signal(stage, z, a - target, times))
    return signals[::-1]


def _field(stage: Stage, x: Tensor) -> Tensor:
    """z of all outputs."""
    layer = stage.layer
    return layer.field(x) if isinstance(layer, Invertible) else layer(x)


def _signal(stage: Stage, z: Tensor, difference: Tensor, times: Tensor) -> Tensor:
    spread = (2 * times).view(-1, *[1] * (z.dim() - 1))
    return stage.gate(spread * difference, z)[:, : stage.outputs]


def _reconstruct(
    stage: Stage,
    a: Tensor,
    x: Tensor,
    target: Tensor,
    rate: Tensor,
    inverse: Tensor,
    backend: str | None,
) -> Tensor:
    """t_{l−1} of the units that are a layer's input; a dense layer is a convolution of 1 × 1 maps."""
    layer, shape = stage.layer, x.shape
    if isinstance(layer, nn.Linear):
        a, x, target, inverse = (t[..., None, None] for t in (a, x, target, inverse))
    return kernels.invertible_conv_reconstruct(
        a, x, inverse, layer.bias, target=target, rate=rate, **windows_of(layer),
        activation=stage.activation, slope=stage.slope, backend=backend,
    ).view(shape)  # fmt: skip
