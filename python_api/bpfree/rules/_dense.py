"""A dense layer that learns from a signal at its output units, whichever way its updates take."""

from __future__ import annotations

from torch import Tensor

import bpfree_kernels as kernels
from bpfree.optimizers import Updates
from bpfree.rules.base import Learner
from bpfree.stages import Layer


def learn_dense(
    learner: Learner,
    layer: Layer,
    post: Tensor,
    pre: Tensor,
    updates: Updates,
    *,
    scale: float,
) -> None:
    """Let a dense layer learn: ∂W = scale · Σ_batch post · preᵀ, ∂b = scale · Σ_batch post.

    Args:
        learner: whose backend runs the op.
        layer: the Linear; one that is frozen stays as it is.
        post: signal, [batch, out].
        pre: presynaptic factor, [batch, in].
        updates: takes the gradients.
        scale: factor of both gradients.
    """
    weight, bias = layer.weight, layer.bias
    fused = updates.fused(weight, bias)
    if fused is not None:
        kernels.dense_step(post, pre, weight, bias, *fused, scale=scale, backend=learner.backend)
    elif updates.wants_any(layer):
        grads = kernels.dense_grad(post, pre, weight, bias, scale=scale, backend=learner.backend)
        updates.deliver_layer(layer, *grads)
