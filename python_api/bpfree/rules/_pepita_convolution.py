"""PEPITA's second pass through a convolution (equations: `bpfree.PEPITA`).

A convolution is linear, so in the first layer both Δz and the gradient split into those of x and of C
basis images F_c, the columns of F as images. With more samples than classes that is less work than to
change every sample's image, and x + F e is never stored::

    Δz = Σ_c e_c · conv(F_c)
    Σ_n grad(x_n + F e_n, Δy_n) = Σ_n grad(x_n, Δy_n) + Σ_c grad(F_c, Σ_n e_nc Δy_n)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

import bpfree_kernels as kernels
from bpfree.convolution import by_place
from bpfree.optimizers import Updates
from bpfree.rules._passes import Kept, Modulation

if TYPE_CHECKING:
    from bpfree.rules.pepita import PEPITA


def change_convolution(learner: PEPITA, kept: Kept, by: Modulation, updates: Updates) -> Tensor:
    """Change of a convolution's output, behind a dropout that directly follows; it learns on the way.

    Args:
        learner: the learner.
        kept: the stage's first pass.
        by: change of the stage's input.
        updates: takes the gradients.

    Returns:
        Δy, [batch, out, height, width]; where it can, it takes the place of the stage's z.
    """
    stage, convolution = kept.stage, learner.convolutions[kept.stage.name]
    images = None
    if by.feedback is not None and by.change.shape[0] > by.change.shape[1]:
        images = convolution.enter(by.feedback.t().view(-1, *kept.x.shape[1:]))
        change, basis = by.change, convolution.linear(images)
    else:
        by = by.written_out(kept.x)
        change, basis = convolution.linear(convolution.enter(by.change)), None
    # Without an activation, z is the stage's output as well, which is still needed.
    in_place = stage.activation != "identity"
    changed = kernels.pepita_difference(
        kept.z, change, basis=basis,
        activation=stage.activation, slope=stage.slope, in_place=in_place,
        backend=learner.backend,
    )  # fmt: skip
    if kept.mask is not None:
        changed = changed.mul_(kept.mask)
    if updates.wants_any(stage.layer):
        _learn(learner, kept, by, images, basis, changed, updates)
    return changed


def _learn(
    learner: PEPITA,
    kept: Kept,
    by: Modulation,
    images: Tensor | None,
    basis: Tensor | None,
    changed: Tensor,
    updates: Updates,
) -> None:
    """∂W = −Σ Δy · patch(pre) / (N·P), ∂b = −Σ Δy / (N·P).

    `images` are the F_c and `basis` the conv(F_c), if they are used.
    """
    layer, convolution = kept.stage.layer, learner.convolutions[kept.stage.name]
    modulated = learner.presynaptic == "modulated"
    pre = by.of(kept.x) if modulated and images is None else kept.x
    positions = changed.shape[2] * changed.shape[3]
    divisor = {"mean": positions, "sqrt": math.sqrt(positions), "sum": 1}[learner.space]
    scale = -1 / (changed.shape[0] * divisor)
    of_weight, of_bias = convolution.gradients(changed, pre, scale)
    if modulated and images is not None and basis is not None:
        # Σ_n e_nc Δy_n; in the order of memory, so that nothing is copied
        mixed, _ = kernels.dense_grad(
            by.change, by_place(changed).flatten(1), by_place(basis).flatten(1), None,
            backend=learner.backend,
        )  # fmt: skip
        mixed = mixed.view(-1, *changed.shape[2:], changed.shape[1]).permute(0, 3, 1, 2)
        convolution.gradients(mixed, images, scale, add_to=of_weight)
    updates.deliver_layer(layer, of_weight, of_bias)
