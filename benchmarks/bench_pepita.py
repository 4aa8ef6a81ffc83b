"""PEPITA: dense and convolutional training steps against torch's products and operations, eager torch,
torch.compile, the literal two passes and a backprop step.

    pytest benchmarks/bench_pepita.py --results docs/results/cpu-pepita
"""

from __future__ import annotations

import math

import pytest
import torch
from compare import Step, compare, graphed, relative_error
from formulations import backprop_step, linears, mlp
from pepita_formulations import (
    bare_products,
    difference_form,
    needed_operations,
    update_by_position,
)
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import bpfree
import bpfree_kernels as bk
from bpfree.plain import PlainPEPITA

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CLASSES = 10
LR, MOMENTUM = 1e-4, 0.9


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)


def _feedback(n_in: int, device: str) -> Tensor:
    bound = 0.05 * math.sqrt(6 / n_in)
    return (torch.rand(CLASSES, n_in, device=device) * 2 - 1).mul_(bound).t()


def _ours(model: nn.Sequential, feedback: Tensor, x: Tensor, labels: Tensor) -> Step:
    rule = bk.SGD(LR, MOMENTUM)
    first, last = (layer.weight.detach() for layer in linears(model))
    of_first, of_last = rule.new_state(first), rule.new_state(last)

    def step() -> None:
        z, h = bk.dense_forward(x, first, None, activation="relu")
        error = bk.classifier_forward(h, last, None, labels).error
        pre = torch.addmm(x, error, feedback.t())
        change = bk.pepita_linear_step(
            z, pre, error, first, None, rule, of_first, feedback=feedback
        )
        bk.dense_step(error, h + change, last, None, rule, of_last, scale=1 / len(x))

    return step


def _errors(model: nn.Sequential, feedback: Tensor, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Error of the hidden weight's gradient: ours and the literal two passes, in x's precision."""
    first, last = (layer.weight.detach() for layer in linears(model))

    def gradient(convert: type | None, backend: str | None) -> Tensor:
        x_, f_, w_, v_ = (t.cpu().double() if convert else t for t in (x, feedback, first, last))
        z, h = bk.dense_forward(x_, w_, None, activation="relu", backend=backend)
        error = bk.classifier_forward(h, v_, None, labels.to(x_.device), backend=backend).error
        pre = torch.addmm(x_, error, f_.t())
        return bk.pepita_linear_grad(z, pre, error, w_, None, feedback=f_, backend=backend)[1]

    exact = gradient(float, "reference")
    literal = PlainPEPITA(model, {"input": feedback}, _sgd(model), "ce")
    literal.backward(x, labels)
    two_passes = linears(model)[0].weight.grad
    assert two_passes is not None
    return {
        "ours": relative_error(gradient(None, None), exact),
        "literal two passes": relative_error(two_passes, exact),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("widths", "batch"), [([3072, 1024, 10], 64), ([8192, 8192, 10], 128)], ids=["cifar", "wide"]
)
def test_dense_step(
    benchmark: BenchmarkFixture, widths: list[int], batch: int, device: str
) -> None:
    torch.manual_seed(0)
    x = torch.rand(batch, widths[0], device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    feedback = _feedback(widths[0], device)

    def net() -> nn.Sequential:
        return mlp(widths, device, nn.ReLU, bias=False)

    def formula() -> Step:
        model = net()
        return difference_form(model, feedback, _sgd(model), x, labels)

    def literal() -> Step:
        model = net()
        plain = PlainPEPITA(model, {"input": feedback}, _sgd(model), "ce")
        return lambda: plain.step(x, labels)

    def backprop() -> Step:
        model = net()
        return backprop_step(model, _sgd(model), x, labels, "ce")

    ours = _ours(net(), feedback, x, labels)
    sides: dict[str, Step] = {
        "ours": ours,
        "bare products (torch.mm)": bare_products(net(), feedback, x),
        "eager formula": formula(),
        "torch.compile of it": torch.compile(formula()),
        "literal two passes": literal(),
        "backprop step": backprop(),
    }
    if device == "cuda":
        sides |= {
            f"{name}, graph": graphed(sides[name])
            for name in ("ours", "eager formula", "backprop step")
        }
        sides = {"ours, graph": sides.pop("ours, graph"), **sides}
    name = f"pepita {'-'.join(map(str, widths))} batch {batch} sgd momentum {device}"
    errors = _errors(net(), feedback, x, labels)
    rounds, inner = (10, 2) if widths[0] > 4000 and device == "cpu" else (15, 10)
    result = compare(name, sides, device=device, rounds=rounds, inner=inner, errors=errors)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(ours, rounds=5, iterations=1)


def _convolutional(channels: int, size: int, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    pooled = (size - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * pooled * pooled, CLASSES, bias=False),
    ).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "size", "batch"), [(1, 28, 100), (3, 32, 100)], ids=["mnist", "cifar"]
)
def test_convolutional_step(
    benchmark: BenchmarkFixture, channels: int, size: int, batch: int, device: str
) -> None:
    torch.manual_seed(0)
    x = torch.rand(batch, channels, size, size, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    feedback = _feedback(x[0].numel(), device)

    def net() -> nn.Sequential:
        return _convolutional(channels, size, device)

    model = net()
    learner = bpfree.PEPITA(model, _sgd(model), feedback={"input": feedback})
    plain_model = net()
    plain = PlainPEPITA(plain_model, {"input": feedback}, _sgd(plain_model), "ce")
    other = net()
    sides: dict[str, Step] = {
        "ours": lambda: learner.step(x, labels),
        "needed torch operations": needed_operations(net(), feedback, x),
        "needed torch operations, channels last": needed_operations(
            net(), feedback, x.contiguous(memory_format=torch.channels_last)
        ),
        "literal two passes": lambda: plain.step(x, labels),
        "update by position": update_by_position(net(), feedback, x),
        "backprop step": backprop_step(other, _sgd(other), x, labels, "ce"),
    }
    name = f"pepita conv 32@5x5 on {channels}x{size}x{size} batch {batch} {device}"
    result = compare(name, sides, device=device, rounds=10, inner=3)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)
