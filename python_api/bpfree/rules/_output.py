"""The output layer, which learns alike in most rules: from the true gradient of its loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as kernels
from bpfree.losses import op_arguments
from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules.base import Learner
from bpfree.stages import Stage


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
    output = learner.network.output
    layer = output.layer
    arguments = op_arguments(learner.loss)
    fused = None if output.has_auxiliary else updates.fused(layer.weight, layer.bias)
    if fused is not None:
        result = kernels.classifier_step(
            x, layer.weight, layer.bias, y, *fused, backend=learner.backend, **arguments
        )
    else:
        result, of_weight, of_bias = kernels.classifier_grad(
            x, *output.first(), y, backend=learner.backend, **arguments
        )
        updates.deliver_layer(layer, *_with_zeros(output, of_weight, of_bias))
    return StepResult(result.loss.mean(), result.output)


def _with_zeros(
    output: Stage, of_weight: Tensor, of_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the outputs that are handed on, with those of the auxiliary ones, which are 0."""
    missing = output.layer.weight.shape[0] - output.outputs
    if missing == 0:
        return of_weight, of_bias
    of_bias = None if of_bias is None else F.pad(of_bias, (0, missing))
    return F.pad(of_weight, (0, 0, 0, missing)), of_bias
