"""The two baselines: Shallow trains the output layer only, BP is torch itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import assert_close, assert_equal, conv, conv_batch, dense, dense_batch, hinge, snapshot
from torch import Tensor, nn

import bpfree

NETS: dict[str, tuple[Callable[..., nn.Sequential], tuple[Tensor, Tensor]]] = {
    "dense": (dense, dense_batch()),
    "conv": (conv, conv_batch()),
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": F.cross_entropy,
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 4).to(z)),
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 4).to(z)),
    "hinge": lambda z, y: hinge(z, y).mean(),
}

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ce": lambda z: z.softmax(1),
    "bce": torch.sigmoid,
    "mse": lambda z: z,
    "hinge": lambda z: z,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_bp_is_autograd_and_the_optimizer(loss: str, net: str) -> None:
    make, (x, y) = NETS[net]
    model, plain = make(dropout=0.3), make(dropout=0.3)
    learner = bpfree.BP(model, torch.optim.Adam(model.parameters(), lr=0.01), loss=loss)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for seed in range(3):
        torch.manual_seed(seed)
        result = learner.step(x, y.int())
        torch.manual_seed(seed)
        logits = plain(x)
        wanted = LOSSES[loss](logits, y)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(result.loss, wanted.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(result.output, OUTPUTS[loss](logits).detach())
        assert not result.loss.requires_grad
        assert not result.output.requires_grad
    assert_close(model, plain, 1e-13)
    assert all(p.grad is None for p in model.parameters())


def test_bp_grads() -> None:
    x, y = conv_batch()
    learner, plain = bpfree.BP(conv()), conv()
    F.cross_entropy(plain(x), y).backward()
    for factor in (1, 2):
        learner.grads(x, y)
        for ours, theirs in zip(learner.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, factor * theirs.grad, rtol=1e-13, atol=0)


def test_bp_leaves_frozen_layers_alone() -> None:
    model = dense()
    model[2].requires_grad_(False)
    learner = bpfree.BP(model, torch.optim.SGD([*model[2].parameters(), model[7].weight], lr=0.1))
    before = snapshot(model)
    learner.step(*dense_batch())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"7.weight"}
    assert model[5].weight.grad is None


def test_bp_takes_no_backend() -> None:
    with pytest.raises(ValueError, match="backend has no meaning for BP"):
        bpfree.BP(dense(), backend="reference")


@pytest.mark.parametrize("net", NETS)
def test_shallow_trains_the_output_layer_only(net: str) -> None:
    make, (x, y) = NETS[net]
    shallow, drtp = make(), make()
    before = snapshot(shallow)
    optimizer = torch.optim.SGD(shallow.parameters(), lr=0.1)
    learner = bpfree.Shallow(shallow, optimizer)
    bpfree.DRTP(drtp, torch.optim.SGD(drtp.parameters(), lr=0.1)).step(x, y)
    result = learner.step(x, y)
    output = {name for name, _ in shallow.named_parameters()}
    output = set(sorted(output, key=lambda name: int(name.split(".")[0]))[-2:])
    for name, parameter in shallow.named_parameters():
        if name in output:
            wanted = drtp.get_parameter(name)
            torch.testing.assert_close(parameter, wanted, rtol=1e-14, atol=1e-15)
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])
    assert result.output.min() > 0
    assert "Shallow trains the output layer only" in learner.explain()
    assert "fused with SGD" in learner.explain()


def test_shallow_grads() -> None:
    learner = bpfree.Shallow(dense())
    before = snapshot(learner.model)
    learner.grads(*dense_batch())
    with_grad = {n for n, p in learner.model.named_parameters() if p.grad is not None}
    assert with_grad == {"7.weight", "7.bias"}
    assert_equal(learner.model, before)


def test_default_losses() -> None:
    losses = {rule: rule(dense()).loss for rule in (bpfree.DRTP, bpfree.Shallow, bpfree.BP)}
    assert losses == {bpfree.DRTP: "bce", bpfree.Shallow: "bce", bpfree.BP: "ce"}


@pytest.mark.parametrize("rule", [bpfree.DRTP, bpfree.Shallow, bpfree.BP])
def test_every_rule_refuses_alike(rule: type[bpfree.Learner]) -> None:
    model = dense()
    learner = rule(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = snapshot(model)
    x, y = dense_batch()
    with pytest.raises(IndexError, match="got 9"):
        learner.step(x, y + 9)
    with pytest.raises(ValueError, match="12 features"):
        learner.step(x[:, 1:], y)
    assert_equal(model, before)
    with pytest.raises(TypeError, match="not supported"):
        rule(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)))
