"""Random feedback: what carries a label, an error or a signal back into a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bpfree import seeds
from bpfree.nn._locally_connected import spread


def draw(classes: int, units: tuple[int, ...], *, seed: int, position: int) -> Tensor:
    """Draw the feedback of one layer, B ~ U(−√(6/n), √(6/n)) with n the number of its units.

    The bound is that of the authors' code, which has n = out for a dense layer and n = O·H·W for a
    convolution (`torch.nn.init.kaiming_uniform_` of a tensor of this shape).

    Args:
        classes: number of classes C.
        units: the layer's units: (out,), or (O, H, W) for a convolution, before pooling.
        seed: seed of the learner.
        position: position of the layer in the model; each layer has a generator of its own, so
            that one layer's feedback depends on no other's.

    Returns:
        float32, on the CPU, [classes, *units]: the same values for every device and dtype.
    """
    bound = math.sqrt(6 / math.prod(units))
    feedback = torch.empty(classes, *units, dtype=torch.float32, device="cpu")
    return feedback.uniform_(-bound, bound, generator=seeds.generator("feedback", seed, position))


def draw_input(features: int, classes: int, *, scale: float, seed: int) -> Tensor:
    """Draw PEPITA's projection of the error onto the input, F ~ U(±scale·√(6/features)).

    Args:
        features: number of values n that enter the first layer.
        classes: number of classes C.
        scale: factor of the bound; F's standard deviation is ``scale * sqrt(2 / features)``.
        seed: seed of the learner.

    Returns:
        float32, on the CPU, [features, classes]: the transpose of a contiguous tensor.
    """
    bound = scale * math.sqrt(6 / features)
    feedback = torch.empty(classes, features, dtype=torch.float32, device="cpu")
    generator = seeds.generator("feedback of the input", seed, 0)
    return feedback.uniform_(-bound, bound, generator=generator).t()


def draw_weights(weight: Tensor, *, seed: int, position: int) -> Tensor:
    """Draw feedback weights that lie like a layer's forward weights, R ~ U(±√(6/(k·k·(in + out)))).

    The bound is Glorot's, k·k the size of a convolution's kernel (1 for a dense layer). Those of a
    locally connected layer begin alike at every position: they are the convolution's, copied.

    Args:
        weight: [out, in], [out, in/groups, kernel_h, kernel_w], or that of a
            `bpfree.nn.LocallyConnected2d`; only its shape is read.
        seed: seed of the learner.
        position: position of the layer in the model.

    Returns:
        float32, on the CPU, shaped like `weight`.
    """
    untied = weight.dim() == 6
    like = weight[0, 0].permute(3, 2, 0, 1) if untied else weight  # its convolution's kernel
    kernel = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    generator = seeds.generator("feedback weights", seed, position)
    nn.init.xavier_uniform_(kernel, generator=generator)
    return spread(kernel, weight.shape[:2]) if untied else kernel
