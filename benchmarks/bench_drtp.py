"""DRTP: a training step against torch.mm's bare products, eager torch, torch.compile, the authors'
formulation and a backprop step.

    pytest benchmarks/bench_drtp.py --results docs/results/cpu
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import Step, compare, graphed, relative_error
from formulations import backprop_step, bare_products, drtp_step, linears, mlp
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import bpfree_kernels as bk
from bpfree.plain import PlainDRTP

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CLASSES = 10
LR = 1e-4


def _optimizer(name: str, model: nn.Module, device: str) -> torch.optim.Optimizer:
    # torch's fused implementations: the fastest that it has on either device
    options = {"capturable": True} if device == "cuda" and name == "adam" else {}
    maker = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    return maker(model.parameters(), lr=LR, fused=True, **options)


def _ours(name: str, widths: list[int], feedback: list[Tensor], x: Tensor, labels: Tensor) -> Step:
    model = mlp(widths, x.device.type)
    rule = {"sgd": bk.SGD(LR), "adam": bk.Adam(LR)}[name]
    *hidden, last = [
        (layer.weight, layer.bias, rule.new_state(layer.weight, layer.bias))
        for layer in linears(model)
    ]

    def step() -> None:
        y = x
        for (weight, bias, state), rows in zip(hidden, feedback, strict=True):
            y = bk.drtp_linear_step(y, weight, bias, rows, labels, rule, state)
        weight, bias, state = last
        bk.classifier_step(y, weight, bias, labels, rule, state, loss="bce")

    return step


def _errors(widths: list[int], feedback: Tensor, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Error of the first layer's weight gradient: ours and eager torch's, in x's precision."""
    layer = linears(mlp(widths, x.device.type))[0]
    args = (x, layer.weight, layer.bias, feedback, labels)
    wide = [t.double() if t.is_floating_point() else t for t in args]
    _, exact, _ = bk.drtp_linear_grad(*(t.cpu() for t in wide), backend="reference")
    _, ours, _ = bk.drtp_linear_grad(*args)
    _, eager, _ = bk.drtp_linear_grad(*args, backend="reference")
    return {"ours": relative_error(ours, exact), "eager formula": relative_error(eager, exact)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("widths", "batch"), [([784, 1000, 10], 60), ([8192, 8192, 10], 128)], ids=["mnist", "wide"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_step(
    benchmark: BenchmarkFixture, optimizer: str, widths: list[int], batch: int, device: str
) -> None:
    torch.manual_seed(0)
    x = torch.rand(batch, widths[0], device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    feedback = [torch.randn(CLASSES, n, device=device) * n**-0.5 for n in widths[1:-1]]
    names = [str(i) for i, layer in enumerate(mlp(widths, "cpu")) if isinstance(layer, nn.Linear)]
    models = (mlp(widths, device) for _ in itertools.count())

    def plain_formula() -> Step:
        model = next(models)
        return drtp_step(model, feedback, _optimizer(optimizer, model, device), x, labels)

    def authors() -> Step:
        model = next(models)
        by_name = dict(zip(names, feedback, strict=False))
        maker = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        plain = PlainDRTP(model, by_name, maker(model.parameters(), lr=LR), "bce")
        return lambda: plain.step(x, labels)

    def backprop() -> Step:
        model = next(models)
        return backprop_step(model, _optimizer(optimizer, model, device), x, labels)

    ours = _ours(optimizer, widths, feedback, x, labels)
    sides: dict[str, Step] = {
        "ours": ours,
        "bare products (torch.mm)": bare_products(next(models), x),
        "eager formula": plain_formula(),
        "torch.compile of it": torch.compile(plain_formula()),
        "authors' formulation": authors(),
        "backprop step": backprop(),
    }
    if device == "cuda":
        graphs = ("ours", "eager formula", "backprop step")
        sides |= {f"{name}, graph": graphed(sides[name]) for name in graphs}
        sides = {"ours, graph": sides.pop("ours, graph"), **sides}
    name = f"drtp {'-'.join(map(str, widths))} batch {batch} {optimizer} {device}"
    errors = _errors(widths, feedback[0], x, labels)
    # Runs of steps, as in training, where a small net's weights stay in the cache. Alternating after
    # very few steps measures a cold cache instead: our figures are then lower.
    rounds, inner = (12, 2) if widths[0] > 1000 and device == "cpu" else (30, 20)
    result = compare(name, sides, device=device, rounds=rounds, inner=inner, errors=errors)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(ours, rounds=10, iterations=1)
