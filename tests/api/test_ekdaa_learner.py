"""EKDAA: its gradients and steps against the equations and plain PyTorch, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ekdaa_equations import ekdaa_gradients
from nets import assert_close, assert_equal, snapshot
from torch import Tensor, nn
from urfb_equations import Layer

import bpfree
from bpfree.data import load
from bpfree.nn import Signum
from bpfree.plain import PlainEKDAA
from bpfree_kernels import UPSAMPLINGS

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
}

ACTIVATIONS: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.Tanh: np.tanh,
    Signum: np.sign,
}


def make(dtype: torch.dtype = torch.float64, dropout: float = 0.3) -> nn.Sequential:
    """2×6×6 inputs; poolings that overlap, every way down, groups, strides and "same", 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 6, 2, padding="same", groups=2),
        nn.Sigmoid(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        Signum(),
        nn.Conv2d(5, 4, 2, padding=1, bias=False),
        nn.Hardtanh(),
        nn.MaxPool2d(2, 1, ceil_mode=True),
        nn.Dropout(dropout),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 7),
        nn.LeakyReLU(0.1),
        nn.Linear(7, 6),
        nn.Tanh(),
        nn.Dropout(dropout, inplace=True),
        nn.Linear(6, 4),
    ).to(dtype)


def batch(samples: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, torch.arange(samples) % 3


def dense(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """72 inputs, two hidden layers, 4 classes."""
    torch.manual_seed(0)
    layers = nn.Linear(72, 7), activation(), nn.Linear(7, 5), activation(), nn.Linear(5, 4)
    return nn.Sequential(nn.Flatten(), *layers).double()


def pooled(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """2×8×8 inputs, two convolutions with pooling above each, and a third, 3 classes."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2), activation(), nn.Flatten(),
        nn.Linear(3, 5), activation(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def as_equations(model: nn.Sequential, height: int, width: int) -> list[Layer]:
    """The layers of a model whose poolings are all of 2 by 2."""
    layers: list[Layer] = []
    for module in model:
        if isinstance(module, nn.Conv2d):
            weight, bias = module.weight.detach().numpy(), module.bias.detach()
            margin = int(module.padding[0])
            rows, columns = (n + 2 * margin - weight.shape[2] + 1 for n in (height, width))
            units = bias.repeat_interleave(rows * columns).numpy()
            layers.append(Layer(weight, units, (height, width), margin))
            height, width = rows, columns
        elif isinstance(module, nn.MaxPool2d):
            layers[-1].pool = True
            height, width = height // 2, width // 2
        elif isinstance(module, nn.Linear):
            layers.append(Layer(module.weight.detach().numpy(), module.bias.detach().numpy()))
    return layers


def check_equations(learner: bpfree.EKDAA, x: Tensor, y: Tensor, f: Any) -> None:
    learner.grads(x, y)
    feedback = [e.numpy() for e in learner.feedback.values()]
    of_weights, of_biases = ekdaa_gradients(
        as_equations(learner.model, 8, 8), feedback, x.flatten(1).numpy(), y.numpy(),
        f=f, beta=learner.beta, upsample=learner.upsample,
    )  # fmt: skip
    share = 1 / len(x) if learner.reduction == "mean" else 1
    parts = [stage.layer for stage in learner.network.stages]
    for part, of_weight, of_bias in zip(parts, of_weights, of_biases, strict=True):
        np.testing.assert_allclose(part.weight.grad, share * of_weight, rtol=1e-10, atol=1e-13)
        summed = of_bias.reshape(len(part.bias), -1).sum(1)
        np.testing.assert_allclose(part.bias.grad, share * summed, rtol=1e-10, atol=1e-13)
        assert part.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_dense_layers_are_the_equations(
    activation: type[nn.Module], reduction: str
) -> None:
    """E1, E4: LRA-E, with tanh and signum."""
    learner = bpfree.EKDAA(dense(activation), beta=0.7, reduction=reduction, seed=2)
    check_equations(learner, *batch(), ACTIVATIONS[activation])


@pytest.mark.parametrize("upsample", UPSAMPLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_convolutions_are_the_equations(
    activation: type[nn.Module], upsample: str
) -> None:
    """E2 to E5: through pooling, E in W's layout by transposed convolution, ∂W as backpropagation has it."""
    beta = 0.9 if activation is nn.Tanh else 9.0  # or no sign changes so far below
    learner = bpfree.EKDAA(pooled(activation), beta=beta, upsample=upsample, seed=2)
    x, y = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 2, 1])
    check_equations(learner, x, y, ACTIVATIONS[activation])


@pytest.mark.parametrize("upsample", UPSAMPLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "mean", "max_norm": 0.2, "gamma": 0.5}], ids=str
)
def test_steps_are_those_of_plain_pytorch(
    optimizer: str, upsample: str, options: dict[str, Any]
) -> None:
    """W and E, fused or re-scaled, over every way down, with dropout as torch draws it."""
    model, other = make(), make()
    learner = bpfree.EKDAA(
        model, OPTIMIZERS[optimizer](model), upsample=upsample, seed=4, **options
    )
    before = {name: e.clone() for name, e in learner.feedback.items()}
    plain = PlainEKDAA(
        other, learner.feedback, OPTIMIZERS[optimizer](other), upsample=upsample, **options
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
        assert (feedback - before[name]).abs().max() > 1e-6


@pytest.mark.parametrize("loss", ["ce", "bce", "mse", "hinge"])
def test_every_loss_gives_its_error(loss: str) -> None:
    model, other = make(dropout=0.0), make(dropout=0.0)
    learner = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model), loss=loss)
    plain = PlainEKDAA(other, learner.feedback, OPTIMIZERS["sgd"](other), loss)
    torch.testing.assert_close(learner.step(*batch()), plain.step(*batch()), rtol=1e-10, atol=1e-12)
    assert_close(model, other)


def test_feedback_learns_gamma_times_what_the_weights_learn() -> None:
    """E8, and the sign: with SGD E moves by γ times W's step, and with γ = 0 not at all."""
    for gamma in (0.1, -0.3, 0.0):
        model = make(dropout=0.0)
        learner = bpfree.EKDAA(model, OPTIMIZERS["momentum"](model), gamma=gamma)
        start, before = snapshot(model), {n: e.clone() for n, e in learner.feedback.items()}
        for _ in range(3):
            learner.step(*batch())
        for name, feedback in learner.feedback.items():
            moved = model.get_parameter(f"{name}.weight") - start[f"{name}.weight"]
            assert moved.abs().max() > 1e-4
            if gamma == 0:
                assert torch.equal(feedback, before[name])
            else:
                torch.testing.assert_close(
                    feedback - before[name], gamma * moved, rtol=1e-9, atol=1e-14
                )
        assert bool(learner.buffers) == (gamma != 0)


def test_another_optimizer_gives_its_increment_to_the_feedback() -> None:
    model = make(dropout=0.0)
    learner = bpfree.EKDAA(model, torch.optim.RMSprop(model.parameters(), lr=0.01), gamma=0.25)
    start, before = snapshot(model), {n: e.clone() for n, e in learner.feedback.items()}
    for _ in range(3):
        learner.step(*batch())
    for name, feedback in learner.feedback.items():
        moved = model.get_parameter(f"{name}.weight") - start[f"{name}.weight"]
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(feedback - before[name], 0.25 * moved, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_targets_that_do_not_move_teach_nothing(optimizer: str) -> None:
    """E7: with β = 0 the hidden layers stay bit for bit, the output layer learns."""
    model = make(dropout=0.0)
    learner = bpfree.EKDAA(model, OPTIMIZERS[optimizer](model), beta=0.0)
    before = snapshot(model)
    for _ in range(2):
        learner.step(*batch())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("19."), name


def test_errors_come_down_through_the_old_feedback() -> None:
    """E10: the first step's gradients do not depend on what E learns in it."""
    weights = []
    for gamma in (0.0, 50.0):
        model = make(dropout=0.0)
        learner = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model), gamma=gamma)
        weights.append(model)
        learner.step(*batch())
    assert_equal(weights[0], snapshot(weights[1]))


def test_the_mean_is_the_sums_share() -> None:
    grads = {}
    for reduction in ("sum", "mean"):
        model = make(dropout=0.0)
        bpfree.EKDAA(model, reduction=reduction).grads(*batch(samples=5))
        grads[reduction] = [p.grad for p in model.parameters()]
    for whole, mean in zip(grads["sum"], grads["mean"], strict=True):
        torch.testing.assert_close(mean, whole / 5, rtol=1e-12, atol=0)
        assert whole.abs().max() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "unfused"])
def test_long_gradients_are_cut_each_by_itself(optimizer: str) -> None:
    """E6: of W, b and E; short ones stay. With lr 1 a step is its gradient."""
    model, whole = make(dropout=0.0), make(dropout=0.0)
    kinds = {"sgd": torch.optim.SGD, "unfused": torch.optim.ASGD}
    options = {} if optimizer == "sgd" else {"lambd": 0.0, "alpha": 0.0}
    limit = 0.5
    learner = bpfree.EKDAA(
        model, kinds[optimizer](model.parameters(), lr=1.0, **options), max_norm=limit, gamma=1.5
    )
    bpfree.EKDAA(whole).grads(*batch())
    start, before = snapshot(model), {n: e.clone() for n, e in learner.feedback.items()}
    learner.grads(*batch())
    found = set()
    for name, parameter in model.named_parameters():
        grad = whole.get_parameter(name).grad
        wanted = grad * min(1.0, limit / grad.norm())
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-13)
        found.add(bool(grad.norm() > limit))
    assert found == {True, False}
    cut = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    learner.step(*batch())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - parameter, cut[name], rtol=1e-9, atol=1e-13)
    for name, feedback in learner.feedback.items():
        grad = 1.5 * whole.get_parameter(f"{name}.weight").grad
        wanted = grad * min(1.0, limit / grad.norm())
        if optimizer == "unfused":  # γ times the increment of W
            wanted = 1.5 * cut[f"{name}.weight"]
        torch.testing.assert_close(before[name] - feedback, wanted, rtol=1e-9, atol=1e-13)


def test_a_gradient_of_zero_has_no_length_to_cut() -> None:
    model = make(dropout=0.0)
    learner = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model), beta=0.0, max_norm=0.1)
    learner.step(*batch())
    learner.grads(*batch())
    for parameter in model.parameters():
        assert parameter.isfinite().all()
        assert parameter.grad.isfinite().all()


def test_channels_last_and_backends_agree() -> None:
    models = [make(), make(), make()]
    models[1].to(memory_format=torch.channels_last)
    x, y = batch()
    inputs = [x, x.to(memory_format=torch.channels_last), x]
    for model, value, backend in zip(models, inputs, (None, None, "reference"), strict=True):
        learner = bpfree.EKDAA(model, OPTIMIZERS["adam"](model), backend=backend)
        for seed in range(2):
            torch.manual_seed(seed)
            learner.step(value, y.int())
    assert_close(models[1], models[0], 1e-10)
    assert_close(models[2], models[0], 1e-10)


def test_runs_repeat() -> None:
    states = []
    for _ in range(2):
        model = make(torch.float32)
        learner = bpfree.EKDAA(model, OPTIMIZERS["momentum"](model))
        torch.manual_seed(9)
        for _ in range(3):
            learner.step(*batch(dtype=torch.float32))
        states.append([*model.parameters(), *learner.feedback.values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# Learning


def small_conv_net(seed: int) -> nn.Sequential:
    """The paper's net, small: three convolutions, the first two pooled, and two dense layers."""
    torch.manual_seed(seed)
    maps = (1, 8, 16, 32)
    body: list[nn.Module] = []
    for place in range(3):
        body += [nn.Conv2d(maps[place], maps[place + 1], 3, padding=1, bias=False), nn.Tanh()]
        body += [nn.MaxPool2d(2)] if place < 2 else [nn.Flatten()]
    head = nn.Linear(128, 32, bias=False), nn.Tanh(), nn.Linear(32, 10, bias=False)
    model = nn.Sequential(*body, *head)
    for parameter in model.parameters():
        nn.init.xavier_uniform_(parameter)
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_layers_learn_beyond_frozen_ones_and_with_the_printed_sign_unlearn(
    seed: int,
) -> None:
    """The digits: γ = 0.1 does better than frozen hidden layers, the paper's printed sign (−γ) worse."""
    data = load("digits")
    train, test = (data.train_x - 0.5, data.train_y), (data.test_x - 0.5, data.test_y)
    accuracies = {}
    for name, gamma in (("plus", 0.1), ("minus", -0.1), ("frozen", None)):
        model = small_conv_net(seed)
        before = snapshot(model)
        learner: bpfree.Learner
        if gamma is None:  # whose error is the mean's, not the sum's
            optimizer = torch.optim.SGD(model.parameters(), lr=50 * 5e-3, momentum=0.9)
            learner = bpfree.Shallow(model, optimizer, loss="ce")
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9)
            learner = bpfree.EKDAA(model, optimizer, gamma=gamma)
        learner.fit(train, epochs=8, batch_size=50)
        accuracies[name] = learner.evaluate(test).accuracy
        moved = [(p - before[n]).norm() / before[n].norm() for n, p in model.named_parameters()]
        assert all(m > 0.05 for m in moved) == (gamma is not None)
    # They reached 0.95 and 0.98, 0.13 and 0.69, 0.72 and 0.76.
    assert accuracies["plus"] > 0.9
    assert accuracies["plus"] > accuracies["frozen"] + 0.1
    assert accuracies["plus"] > accuracies["minus"] + 0.15
