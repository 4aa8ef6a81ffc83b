"""URFB and FRFB: their gradients and steps, against the equations, backprop and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import assert_close, assert_equal, snapshot
from torch import Tensor, nn
from urfb_equations import Layer, urfb_gradients

import bpfree
from bpfree.nn import LocallyConnected2d, SaturatedLinear
from bpfree.plain import PlainURFB

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "unfused": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
}


def make(dtype: torch.dtype = torch.float64, dropout: float = 0.3) -> nn.Sequential:
    """2×6×6 inputs; every kind of layer below a layer of every kind, 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        LocallyConnected2d(2, 4, 3, padding=1, input_size=(6, 6)),
        SaturatedLinear(0.5),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 5, 2, padding="same"),
        nn.Tanh(),
        LocallyConnected2d(5, 3, 2, input_size=(3, 3)),
        nn.Hardtanh(),
        nn.Dropout(dropout),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(3, 7),
        nn.LeakyReLU(0.1),
        nn.Dropout(dropout, inplace=True),
        nn.Linear(7, 4),
    ).to(dtype)


def batch(samples: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, torch.arange(samples) % 3


def forward_weights(model: nn.Sequential) -> dict[str, Tensor]:
    layers = nn.Linear | nn.Conv2d | LocallyConnected2d
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, layers)}


def units(bias: Tensor, positions: int) -> np.ndarray:
    """A layer's bias, one value for each unit."""
    if bias.dim() == 3:
        return bias.detach().permute(2, 0, 1).flatten().numpy()
    return bias.detach().repeat_interleave(positions).numpy()


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_gradients_are_the_equations(slope: float, untied: bool) -> None:
    """U1: old R, σ′ before R, the factor s; U5: pooling gives the signal to its maximum."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), SaturatedLinear(slope), nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2), SaturatedLinear(slope), nn.Flatten(),
        nn.Linear(8, 6), SaturatedLinear(slope), nn.Linear(6, 3),
    )  # fmt: skip
    if untied:
        bpfree.nn.untie(model, (2, 6, 6))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.double()
    x, y = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 2, 1])
    learner = bpfree.URFB(model, seed=2)
    learner.grads(x, y)

    parts = [model[i] for i in (0, 3, 6, 8)]
    weights = [part.weight.detach().numpy() for part in parts]
    biases = [units(p.bias, n) for p, n in zip(parts, (36, 4, 1, 1), strict=True)]
    layers = [
        Layer(weights[0], biases[0], size=(6, 6), padding=1, pool=True),
        Layer(weights[1], biases[1], size=(3, 3)),
        Layer(weights[2], biases[2]),
        Layer(weights[3], biases[3]),
    ]
    feedback = [learner.feedback[name].numpy() for name in ("3", "6", "8")]
    of_weights, of_biases = urfb_gradients(layers, feedback, x.flatten(1).numpy(), y.numpy(), slope)
    for part, of_weight, of_bias in zip(parts, of_weights, of_biases, strict=True):
        np.testing.assert_allclose(part.weight.grad, of_weight, rtol=1e-10, atol=1e-13)
        if part.bias.dim() == 3:
            got = part.bias.grad.permute(2, 0, 1).flatten()
        else:
            got, of_bias = part.bias.grad, of_bias.reshape(len(part.bias), -1).sum(1)
        np.testing.assert_allclose(got, of_bias, rtol=1e-10, atol=1e-13)
        assert part.weight.grad.abs().max() > 0


def test_a_field_on_the_bound_keeps_its_signal() -> None:
    model = nn.Sequential(nn.Linear(1, 2), SaturatedLinear(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.001]]))
        model[0].bias.zero_()
        model[2].weight.zero_()
        model[2].bias.zero_()
    learner = bpfree.URFB(model)
    learner.grads(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))
    assert model[0].weight.grad[0] != 0
    assert model[0].weight.grad[1] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_minus_feedback_never_changes(optimizer: str, dtype: torch.dtype) -> None:
    """U2: over 100 steps, with momentum and Adam, and where the optimizer runs outside the kernels."""
    model = make(dtype)
    learner = bpfree.URFB(model, OPTIMIZERS[optimizer](model), seed=3)
    before = {n: r.clone() for n, r in learner.feedback.items()}
    weights = forward_weights(model)
    gaps = {name: weights[name] - r for name, r in before.items()}
    for _ in range(100):
        learner.step(*batch(dtype=dtype))
    for name, feedback in learner.feedback.items():
        assert (feedback - before[name]).abs().max() > 0.01
        scale = max(1.0, feedback.abs().max().item())
        change = (weights[name] - feedback - gaps[name]).abs().max()
        assert change < 1e-6 * scale, name


def test_weight_minus_feedback_outlives_a_schedule() -> None:
    """A learning rate and a momentum that change, to 0 and back: both follow the optimizer's groups."""
    model = make()
    optimizer = OPTIMIZERS["momentum"](model)
    learner = bpfree.URFB(model, optimizer)
    weights = forward_weights(model)
    gaps = {name: weights[name] - r for name, r in learner.feedback.items()}
    for momentum, lr in ((0.9, 0.1), (0.0, 0.05), (0.8, 0.2), (0.9, 0.0)):
        optimizer.param_groups[0].update(momentum=momentum, lr=lr)
        for _ in range(2):
            learner.step(*batch())
    for name, feedback in learner.feedback.items():
        torch.testing.assert_close(weights[name] - feedback, gaps[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_feedback_that_starts_as_the_weights_is_backprop(optimizer: str) -> None:
    """U3, and U8: dropout as torch draws it, of the first pass in the signal."""
    model, other = make(), make()
    given = {n: w for n, w in forward_weights(model).items() if n != "0"}
    learner = bpfree.URFB(model, OPTIMIZERS[optimizer](model), feedback=given)
    backprop = bpfree.BP(other, OPTIMIZERS[optimizer](other), loss="hinge")
    for seed in range(4):
        results = []
        for one in (learner, backprop):
            torch.manual_seed(seed)
            results.append(one.step(*batch()))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert_close(model, other, 1e-9)


@pytest.mark.parametrize("loss", ["hinge", "ce", "bce", "mse"])
def test_random_feedback_is_not_backprop(loss: str) -> None:
    """The output layer's gradient is, whatever the loss; those below take R in the place of W."""
    model, other = make(dropout=0.0), make(dropout=0.0)
    bpfree.URFB(model, loss=loss).grads(*batch())
    bpfree.BP(other, loss=loss).grads(*batch())
    for name, parameter in model.named_parameters():
        wanted = other.get_parameter(name).grad
        alike = torch.allclose(parameter.grad, wanted, rtol=1e-10, atol=1e-13)
        assert alike == name.startswith("13."), name


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "unfused"])
@pytest.mark.parametrize("rule", [bpfree.URFB, bpfree.FRFB])
def test_steps_are_those_of_plain_pytorch(rule: type[bpfree.URFB], optimizer: str) -> None:
    model, other = make(), make()
    learner = rule(model, OPTIMIZERS[optimizer](model), seed=4)
    plain = PlainURFB(
        other, learner.feedback, OPTIMIZERS[optimizer](other), learns_feedback=rule is bpfree.URFB
    )
    for seed in range(4):
        results = []
        for one in (learner, plain):
            torch.manual_seed(seed)
            results.append(one.step(*batch()))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert_close(model, other, 1e-9)
    for name, feedback in learner.feedback.items():
        torch.testing.assert_close(feedback, plain.feedback[name].detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fixed_feedback_stays(optimizer: str) -> None:
    """U9: bit for bit; and nothing is remembered of it."""
    model = make()
    learner = bpfree.FRFB(model, OPTIMIZERS[optimizer](model))
    before = {name: r.clone() for name, r in learner.feedback.items()}
    weights = snapshot(model)
    for _ in range(3):
        learner.step(*batch())
    for name, feedback in learner.feedback.items():
        assert torch.equal(feedback, before[name])
    assert all(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not learner.buffers


def test_grads_leave_the_feedback() -> None:
    model = make(dropout=0.0)
    learner = bpfree.URFB(model, OPTIMIZERS["adam"](model))
    before, weights = {n: r.clone() for n, r in learner.feedback.items()}, snapshot(model)
    learner.grads(*batch())
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    learner.grads(*batch())
    assert_equal(model, weights)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-13, atol=0)
    assert all(torch.equal(r, before[n]) for n, r in learner.feedback.items())
    assert not learner.buffers


@pytest.mark.parametrize("optimizer", ["sgd", "unfused"])
def test_frozen_layers_keep_weight_and_feedback(optimizer: str) -> None:
    """A frozen layer in the middle still carries the signal; below the first that learns nothing runs."""
    model, whole = make(dropout=0.0), make(dropout=0.0)
    for place in (0, 5):
        model[place].requires_grad_(False)
    learner = bpfree.URFB(model, OPTIMIZERS[optimizer](model))
    everything = bpfree.URFB(whole, OPTIMIZERS[optimizer](whole))
    frozen = learner.feedback["5"].clone()
    before = snapshot(model)
    for one in (learner, everything):
        one.step(*batch())
    assert torch.equal(learner.feedback["5"], frozen)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("0", "5"):
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, whole.get_parameter(name), rtol=1e-13, atol=1e-14)
    for name in ("3", "10", "13"):
        torch.testing.assert_close(
            learner.feedback[name], everything.feedback[name], rtol=1e-13, atol=1e-14
        )


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
        {"padding": "valid", "dilation": 2},
        {"groups": 2, "padding": (0, 2), "bias": False},
    ],
    ids=str,
)
def test_every_kind_of_convolution_carries_the_signal(
    options: dict[str, Any], untied: bool
) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        first, second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
        size = second(torch.zeros(1, 4, 7, 6)).numel()
        body = (first, nn.Tanh(), second, nn.Tanh(), nn.Flatten())
        model = nn.Sequential(*body, nn.Linear(size, 3))
        if untied:
            bpfree.nn.untie(model, (2, 7, 6))
        return model.double()

    x, y = torch.randn(3, 2, 7, 6, dtype=torch.float64), torch.tensor([0, 2, 2])
    learner, model = bpfree.URFB(make(), input_shape=(2, 7, 6)), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PlainURFB(model, learner.feedback, optimizer).backward(x, y)
    learner.grads(x, y)
    for got, wanted in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-11, atol=1e-12)
        assert wanted.grad.abs().max() > 0


def test_weight_and_bias_that_learn_differently() -> None:
    """One rate for weights and another for biases: no op can apply both, and R follows its weight."""
    model = make(dropout=0.0)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("weight")]},
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "lr": 0.5},
    ]
    learner = bpfree.URFB(model, torch.optim.SGD(groups, lr=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gaps = {n: model.get_parameter(f"{n}.weight") - r for n, r in learner.feedback.items()}
    learner.grads(*batch())
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    learner.step(*batch())
    assert "weight and bias do not learn alike" in learner.explain()
    for name, parameter in model.named_parameters():
        rate = 0.1 if name.endswith("weight") else 0.5
        torch.testing.assert_close(parameter, before[name] - rate * grads[name], rtol=1e-12, atol=0)
    for name, gap in gaps.items():
        change = model.get_parameter(f"{name}.weight") - learner.feedback[name] - gap
        assert change.abs().max() < 1e-14


def test_the_way_back_through_dropout_and_pooling_uses_the_first_choices() -> None:
    """U8: a unit that was dropped gets no signal, one that was kept gets it times 1/(1 − p)."""
    model = nn.Sequential(
        nn.Linear(3, 40), nn.Identity(), nn.Dropout(0.8), nn.Linear(40, 2)
    ).double()
    learner = bpfree.URFB(model)
    x = torch.ones(1, 3, dtype=torch.float64)
    torch.manual_seed(0)
    mask = nn.Dropout(0.8)(torch.ones(1, 40, dtype=torch.float64))
    torch.manual_seed(0)
    learner.grads(x, torch.tensor([1]))
    post = model[3].bias.grad @ learner.feedback["3"]
    torch.testing.assert_close(model[0].bias.grad, post * mask[0], rtol=1e-13, atol=0)
    assert set(mask.unique().round(decimals=9).tolist()) == {0.0, 5.0}


def test_channels_last_and_backends_agree() -> None:
    models = [make(), make(), make()]
    models[1].to(memory_format=torch.channels_last)
    x, y = batch()
    inputs = [x, x.to(memory_format=torch.channels_last), x]
    for model, value, backend in zip(models, inputs, (None, None, "reference"), strict=True):
        learner = bpfree.URFB(model, OPTIMIZERS["adam"](model), backend=backend)
        for seed in range(2):
            torch.manual_seed(seed)
            learner.step(value, y.int())
    assert_close(models[1], models[0], 1e-10)
    assert_close(models[2], models[0], 1e-10)


def test_runs_repeat() -> None:
    states = []
    for _ in range(2):
        model = make(torch.float32)
        learner = bpfree.URFB(model, OPTIMIZERS["momentum"](model), connectivity=0.5)
        torch.manual_seed(9)
        for _ in range(3):
            learner.step(*batch(dtype=torch.float32))
        states.append([*model.parameters(), *learner.feedback.values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_model_of_one_layer_has_no_feedback() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
    learner = bpfree.URFB(model, OPTIMIZERS["sgd"](model))
    first, second = (learner.step(*batch()).loss for _ in range(2))
    assert second < first
    assert learner.feedback == {}


def test_explains_itself() -> None:
    model = make()
    learner = bpfree.URFB(model, OPTIMIZERS["sgd"](model))
    lines = learner.explain().splitlines()
    assert lines[0].startswith("URFB, loss hinge")
    assert lines[1].endswith("fused with SGD")
    for line in lines[2:]:
        assert line.endswith("fused with SGD; its feedback learns the same")
    sparse = bpfree.URFB(model, OPTIMIZERS["sgd"](model), connectivity=0.5).explain().splitlines()
    assert sparse[2].endswith("(not every connection exists); its feedback learns the same")
    assert sparse[3].endswith("fused with SGD; its feedback learns the same")
    fixed = bpfree.FRFB(make()).explain()
    assert fixed.count("its feedback stays as it is") == 4
