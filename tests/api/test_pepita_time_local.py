"""PEPITA-TL: two Hebbian halves, each an update of its own."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from nets import assert_equal, conv, dense, dense_batch, snapshot
from pepita_equations import passes, relu_net, softmax
from torch import nn

import bpfree


def time_local(model: nn.Sequential, lr: float = 0.1, **options: Any) -> bpfree.PEPITA:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return bpfree.PEPITA(model, optimizer, time_local=True, feedback_scale=1.0, **options)


@pytest.mark.parametrize("widths", [(7, 30, 3), (7, 20, 10, 3), (7, 3)])
def test_time_local_halves_are_the_equations(widths: tuple[int, ...]) -> None:
    """The second half runs through weights that the first has changed."""
    model = relu_net(*widths)
    learner = time_local(model, lr=0.05)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 2, 2, 0, 2])
    weights = [p.detach().numpy().copy() for p in model.parameters()]
    first = learner.step(x, y)

    h, logits = passes(weights, x.numpy())
    output = softmax(logits)
    error = output - numpy.eye(3)[y.numpy()]
    for layer in range(len(weights) - 1):
        weights[layer] = weights[layer] - 0.05 * h[layer + 1].T @ h[layer] / 5
    h2 = x.numpy() + error @ learner.feedback["input"].numpy().T
    for layer in range(len(weights) - 1):
        before, h2 = h2, numpy.maximum(h2 @ weights[layer].T, 0)
        weights[layer] = weights[layer] + 0.05 * h2.T @ before / 5
    weights[-1] = weights[-1] - 0.05 * error.T @ h2 / 5
    for parameter, wanted in zip(model.parameters(), weights, strict=True):
        numpy.testing.assert_allclose(parameter.detach(), wanted, rtol=1e-11, atol=1e-13)
    numpy.testing.assert_allclose(first.output, output, rtol=1e-12)


def test_time_local_shares_masks_and_counts_two_updates() -> None:
    model = dense(dropout=0.4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    learner = bpfree.PEPITA(model, optimizer, time_local=True)
    learner.step(*dense_batch())
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert steps == [2, 2, 2, 2, 1, 1]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    before = snapshot(net)
    learner = time_local(net)
    torch.manual_seed(4)
    learner.step(torch.randn(1, 6, dtype=torch.float64), torch.tensor([1]))
    torch.manual_seed(4)
    torch.randn(1, 6, dtype=torch.float64)
    dropped = nn.functional.dropout(torch.ones(1, 40, dtype=torch.float64), 0.5)[0] == 0
    still = (net[0].weight == before["0.weight"]).all(1)
    assert still[dropped].all()
    assert not still[~dropped].all()


def test_time_local_leaves_frozen_layers_alone() -> None:
    model = dense()
    model[2].requires_grad_(False)
    before = snapshot(model)
    time_local(model).step(*dense_batch())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"5.weight", "5.bias", "7.weight", "7.bias"}


def test_what_cannot_be_time_local() -> None:
    x, y = dense_batch()
    model = dense()
    with pytest.raises(RuntimeError, match="grads has no meaning with time_local"):
        time_local(model).grads(x, y)
    with pytest.raises(ValueError, match=r"kernels run .* layer '2' .* no RMSprop"):
        bpfree.PEPITA(model, torch.optim.RMSprop(model.parameters()), time_local=True)
    with pytest.raises(ValueError, match=r"dense net, but layer '0\.0' is a convolution"):
        time_local(conv())
    with pytest.raises(
        ValueError, match="time_local needs presynaptic 'modulated', got 'standard'"
    ):
        time_local(model, presynaptic="standard")
    with pytest.raises(ValueError, match="time_local needs output_error 'first', got 'second'"):
        time_local(model, output_error="second")
    before = snapshot(model)
    learner = time_local(model)
    learner.optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="kernels have no maximize"):
        learner.step(x, y)
    assert_equal(model, before)
