"""PEPITA's time-local variant (equations: `bpfree.PEPITA`): two passes, each with its own update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree import differences
from bpfree.losses import name_of, op_arguments
from bpfree.optimizers import OptimizerBridge, Updates
from bpfree.results import StepResult
from bpfree.rules._dense import learn_dense
from bpfree.rules._passes import Modulation

if TYPE_CHECKING:
    from bpfree.rules.pepita import PEPITA
    from bpfree.stages import Stage


def check(learner: PEPITA, bridge: OptimizerBridge | None) -> None:
    """Check that a learner can be time-local.

    Raises:
        ValueError: a convolution, an option that the variant does not have, or an optimizer that
            the kernels do not run, which could apply only one update for each step.
    """
    for name, needed in (("presynaptic", "modulated"), ("output_error", "first")):
        if getattr(learner, name) != needed:
            raise ValueError(f"time_local needs {name} {needed!r}, got {getattr(learner, name)!r}.")
    for stage in learner.network.stages:
        if isinstance(stage.layer, nn.Conv2d):
            raise ValueError(
                f"time_local needs a dense net, but layer {stage.name!r} is a convolution."
            )
        for parameter in stage.layer.parameters(recurse=False):
            why = bridge.why(parameter) if bridge is not None and bridge.wants(parameter) else ""
            if why:
                raise ValueError(
                    "time_local needs an optimizer that the kernels run (SGD, Adam or AdamW), to "
                    f"update layer {stage.name!r} twice in each step, but {why}."
                )


def learn(learner: PEPITA, x: Tensor, y: Tensor, feedback: Tensor, updates: Updates) -> StepResult:
    """Learn one batch.

    Args:
        learner: the learner.
        x: what enters the first layer, [batch, in].
        y: class of each sample, [batch].
        feedback: F, [in, classes].
        updates: applies each gradient at once (`check`).

    Returns:
        Loss and output of the first pass; they come before any update of the output layer.
    """
    h, masks = x, []
    for stage in learner.network.hidden:
        before, h = h, _forward(learner, stage, h)
        mask, rest = differences.leading_dropout(stage.after, h)
        h = h if mask is None else h * mask
        learn_dense(learner, stage.layer, h, before, updates, scale=1 / x.shape[0])
        h, ways = differences.run(rest, h, learner.backend)
        masks.append((mask, ways))
    layer = learner.network.output.layer
    first = kernels.classifier_forward(
        h, layer.weight, layer.bias, y, backend=learner.backend, **op_arguments(learner.loss)
    )
    h = Modulation(first.error, feedback).of(x)
    for stage, (mask, ways) in zip(learner.network.hidden, masks, strict=True):
        before, h = h, _forward(learner, stage, h)
        h = h if mask is None else h * mask
        learn_dense(learner, stage.layer, h, before, updates, scale=-1 / x.shape[0])
        h = differences.pass_on(ways, h)  # linear in a dense net, so it takes h itself as well
    scale = kernels.gradient_scale(name_of(learner.loss), *first.error.shape)
    learn_dense(learner, layer, first.error, h, updates, scale=scale)
    return StepResult(first.loss.mean(), first.output)


def _forward(learner: PEPITA, stage: Stage, x: Tensor) -> Tensor:
    return kernels.dense_forward(
        x, stage.layer.weight, stage.layer.bias,
        activation=stage.activation, slope=stage.slope, backend=learner.backend,
    ).output  # fmt: skip
