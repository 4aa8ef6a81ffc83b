"""What the tests of PEPITA share: comparisons, and the equations in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy
import torch
from nets import conv, conv_batch, dense, dense_batch
from numpy.typing import NDArray
from torch import Tensor, nn

import bpfree
from bpfree.plain import PlainPEPITA

NETS: dict[str, tuple[Callable[..., nn.Sequential], Callable[..., tuple[Tensor, Tensor]]]] = {
    "dense": (dense, dense_batch),
    "conv": (conv, conv_batch),
}
OPTIONS = ("presynaptic", "output_error", "space")


def plain_twin(learner: bpfree.PEPITA, model: nn.Sequential, lr: float = 0.1) -> PlainPEPITA:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {name: getattr(learner, name) for name in OPTIONS}
    return PlainPEPITA(model, learner.feedback, optimizer, learner.loss, **options)


def assert_same_grads(got: nn.Module, wanted: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(
            p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert p.grad.abs().max() > 1e3 * tolerance, f"{name}: too small to compare"


Array = NDArray[numpy.float64]


def softmax(z: Array) -> Array:
    powers = numpy.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def relu_net(*widths: int) -> nn.Sequential:
    """Without biases, ReLU between the layers."""
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for features, units in pairwise(widths):
        layers += [nn.Linear(features, units, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def passes(weights: list[Array], x: Array) -> tuple[list[Array], Array]:
    """h_0 … h_{L−1} and the logits."""
    h = [x]
    for weight in weights[:-1]:
        h.append(numpy.maximum(h[-1] @ weight.T, 0))
    return h, h[-1] @ weights[-1].T
