"""The output layer, which learns alike in most rules: from the true gradient of its loss."""

from __future__ import annotations

from torch import Tensor

import bpfree_kernels as kernels
from bpfree.losses import op_arguments
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules.base import Learner


def learn_output(learner: Learner, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
    """Run the output layer and let it learn.

    Args:
        learner: whose output layer, loss and backend.
        x: input of the output layer, [batch, in].
        y: class of each sample, [batch].
        updates: takes the gradients.

    Returns:
        Loss and output, of the parameters before the update.
    """
    layer = learner.network.output.layer
    weight, bias = layer.weight, layer.bias
    arguments = op_arguments(learner.loss)
    fused = updates.fused(weight, bias)
    if fused is not None:
        result = kernels.classifier_step(
            x, weight, bias, y, *fused, backend=learner.backend, **arguments
        )
    else:
        result, of_weight, of_bias = kernels.classifier_grad(
            x, weight, bias, y, backend=learner.backend, **arguments
        )
        updates.deliver_layer(layer, of_weight, of_bias)
    return StepResult(result.loss.mean(), result.output)
