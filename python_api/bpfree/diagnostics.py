"""How a learner's weights have come to relate to its feedback, and how they are distributed."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from bpfree.rules.base import Learner
from bpfree.rules.bp import BP


class Histogram(NamedTuple):
    """How many values lie between two neighbouring edges.

    Attributes:
        edges: rising, float64 on the CPU, [bins + 1]; from the smallest value to the largest.
        counts: int64 on the CPU, [bins].
    """

    edges: Tensor
    counts: Tensor


def density(histogram: Histogram) -> Tensor:
    """Share of the values for each unit of width, float64, [bins]: its area is 1."""
    total = histogram.counts.sum().clamp(min=1)
    return histogram.counts / (total * histogram.edges.diff())


def has_feedback_angle(learner: Learner) -> bool:
    """Whether a learner has what `feedback_angle` compares."""
    dense = all(isinstance(stage.layer, nn.Linear) for stage in learner.network.stages)
    return dense and "input" in learner.feedback


@torch.no_grad()
def feedback_angle(learner: Learner) -> float:
    """Angle between the product of the forward weights and PEPITA's feedback, in degrees.

    Of the matrices W_L ⋯ W_2 W_1 and Fᵀ, both [classes, inputs], as vectors: figure 3b of the PEPITA
    paper. It begins near 90° and rises in training: the weights come to oppose the feedback, so that
    adding F e to the input lowers the error.

    Args:
        learner: a `bpfree.PEPITA` of a dense net.

    Returns:
        0 to 180; NaN if one of the two is zero.

    Raises:
        ValueError: a learner without feedback for the input, or one whose net has convolutions.
    """
    if "input" not in learner.feedback:
        raise ValueError(
            "feedback_angle needs feedback from the output to the input, which "
            f"{type(learner).__name__} does not have (or not before its first batch)."
        )
    for stage in learner.network.stages:
        if isinstance(stage.layer, nn.Conv2d):
            raise ValueError(
                f"feedback_angle needs a dense net, but layer {stage.name!r} is a convolution."
            )
    product = learner.network.output.layer.weight.double()
    for stage in reversed(learner.network.hidden):
        product = product @ stage.layer.weight.double()
    backward = learner.feedback["input"].to(product.device, torch.float64).t()
    return _angle(product, backward)


def has_update_angles(learner: Learner) -> bool:
    """Whether `update_angles` can compare a learner: backpropagation needs every hidden activation's f′."""
    return all(stage.activation != "sign" for stage in learner.network.stages)


def update_angles(learner: Learner, x: Tensor, y: Tensor) -> dict[str, float]:
    """Angle between a rule's gradient of each weight and backpropagation's, on one batch, in degrees.

    Figures 3 and 4 of the GAIT-prop paper. 0° is backpropagation itself, at 90° and above the layer does
    not go down the loss. What a regulariser adds is left out. With dropout, put the learner in evaluation
    mode, or the two see different nets.

    Args:
        learner: any learner. Nothing of its model changes; what `bpfree.Learner.grads` makes beforehand
            (feedback, the inverses of `bpfree.GAITProp`) is made.
        x, y: a batch, as `bpfree.Learner.step` takes it.

    Returns:
        0 to 180 by the name of each layer that learns; NaN where one of the two is zero.

    Raises:
        IndexError, TypeError, ValueError, RuntimeError: as `bpfree.Learner.grads`; ValueError also for a net
            that backpropagation cannot train (`has_update_angles`).
    """
    if not has_update_angles(learner):
        raise ValueError(
            "update_angles needs a net that backpropagation can train, but the slope of Signum is 0."
        )
    layers = {stage.name: stage.layer.weight for stage in learner.network.stages}
    kept = [(parameter, parameter.grad) for parameter in learner.model.parameters()]
    try:
        found = []
        for gradients in (learner.loss_grads, BP(learner.model, loss=learner.loss).grads):
            for parameter, _ in kept:
                parameter.grad = None
            gradients(x, y)
            found.append({name: weight.grad for name, weight in layers.items()})
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
    ours, true = found
    return {
        name: _angle(grad, other)
        for name, grad in ours.items()
        if grad is not None and (other := true[name]) is not None
    }


def _angle(a: Tensor, b: Tensor) -> float:
    """Angle between two tensors as vectors, in degrees; NaN if one is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    lengths = a.norm().item(), b.norm().item()
    if not all(0 < length < math.inf for length in lengths):
        return math.nan
    # By the chord: the cosine of a small angle has lost its digits.
    chord = (a / lengths[0] - b / lengths[1]).norm().clamp(max=2).item()
    return math.degrees(2 * math.asin(chord / 2))


@overload
def weight_histogram(of: nn.Module, bins: int = 50) -> Histogram: ...


@overload
def weight_histogram(of: Learner, bins: int = 50) -> dict[str, Histogram]: ...


@torch.no_grad()
def weight_histogram(of: nn.Module | Learner, bins: int = 50) -> Histogram | dict[str, Histogram]:
    """Histogram of a layer's weights, or of those of every hidden layer (figure 5 of the PEPITA paper).

    Args:
        of: a layer with a ``weight``, or a learner.
        bins: number of bins of equal width.

    Returns:
        A histogram; for a learner, one for each hidden layer by its name. Weights that are not finite
        are left out.

    Raises:
        TypeError: something without weights.
        ValueError: fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    if isinstance(of, Learner):
        return {s.name: weight_histogram(s.layer, bins) for s in of.network.hidden}
    weight = getattr(of, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight_histogram needs a layer or a learner, got {type(of).__name__}.")
    values = weight.detach().flatten().to("cpu", torch.float64)
    counts, edges = torch.histogram(values[values.isfinite()], bins)
    return Histogram(edges, counts.long())
