"""DRTP: a training step against torch.mm's bare products, eager torch, torch.compile, the authors'
formulation and a backprop step.

    pytest benchmarks/bench_drtp.py --results docs/results/cpu-drtp
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from compare import ALL, Comparison, Step, compare, graphed, relative_error
from formulations import backprop_step, bare_products, drtp_step, linears, mlp
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import bpfree_kernels as bk
from bpfree.plain import PlainDRTP

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CLASSES = 10
LR = 1e-4
Maker = Callable[[], Step]


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


def _errors(widths: list[int], batch: int, device: str) -> dict[str, float]:
    """Error of the first layer's weight gradient: ours and eager torch's, in float32."""
    layer = linears(mlp(widths, device))[0]
    x = torch.rand(batch, widths[0], device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    feedback = torch.randn(CLASSES, widths[1], device=device) * widths[1] ** -0.5
    args = (x, layer.weight, layer.bias, feedback, labels)
    wide = [t.double() if t.is_floating_point() else t for t in args]
    _, exact, _ = bk.drtp_linear_grad(*(t.cpu() for t in wide), backend="reference")
    _, ours, _ = bk.drtp_linear_grad(*args)
    _, eager, _ = bk.drtp_linear_grad(*args, backend="reference")
    return {"ours": relative_error(ours, exact), "eager formula": relative_error(eager, exact)}


def _sides(optimizer: str, widths: list[int], batch: int, device: str) -> dict[str, Maker]:
    """What makes each side's step, ours first, all on the same data and feedback."""
    torch.manual_seed(0)
    x = torch.rand(batch, widths[0], device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    feedback = [torch.randn(CLASSES, n, device=device) * n**-0.5 for n in widths[1:-1]]
    names = [str(i) for i, layer in enumerate(mlp(widths, "cpu")) if isinstance(layer, nn.Linear)]

    def plain_formula() -> Step:
        model = mlp(widths, device)
        return drtp_step(model, feedback, _optimizer(optimizer, model, device), x, labels)

    def authors() -> Step:
        model = mlp(widths, device)
        by_name = dict(zip(names, feedback, strict=False))
        maker = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        plain = PlainDRTP(model, by_name, maker(model.parameters(), lr=LR), "bce")
        return lambda: plain.step(x, labels)

    def backprop() -> Step:
        model = mlp(widths, device)
        return backprop_step(model, _optimizer(optimizer, model, device), x, labels)

    return {
        "ours": lambda: _ours(optimizer, widths, feedback, x, labels),
        "bare products (torch.mm)": lambda: bare_products(mlp(widths, device), x),
        "eager formula": plain_formula,
        "torch.compile of it": lambda: torch.compile(plain_formula()),
        "authors' formulation": authors,
        "backprop step": backprop,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("widths", "batch"), [([784, 1000, 10], 60), ([8192, 8192, 10], 128)], ids=["mnist", "wide"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_step(
    benchmark: BenchmarkFixture, optimizer: str, widths: list[int], batch: int, device: str
) -> None:
    sides = {name: make() for name, make in _sides(optimizer, widths, batch, device).items()}
    ours = sides["ours"]
    if device == "cuda":
        graphs = ("ours", "eager formula", "backprop step")
        sides |= {f"{name}, graph": graphed(sides[name]) for name in graphs}
        sides = {"ours, graph": sides.pop("ours, graph"), **sides}
    name = f"drtp {'-'.join(map(str, widths))} batch {batch} {optimizer} {device}"
    errors = _errors(widths, batch, device)
    # Runs of steps, as in training, where a small net's weights stay in the cache. Alternating after
    # very few steps measures a cold cache instead: our figures are then lower.
    rounds, inner = (12, 2) if widths[0] > 1000 and device == "cpu" else (30, 20)
    result = compare(name, sides, device=device, rounds=rounds, inner=inner, errors=errors)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(ours, rounds=10, iterations=1)


_ALONE = ("ours", "bare products (torch.mm)", "authors' formulation", "backprop step")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_step_in_a_plain_process(benchmark: BenchmarkFixture, optimizer: str) -> None:
    """The sides without a compiler in a process that has done nothing else, as a training script has not.

    There glibc's malloc gives a step's memory back to the system and takes it anew at the next one.
    In the process of `test_step` earlier and larger buffers have taught it to keep the memory.
    """
    done = subprocess.run(
        [sys.executable, __file__, optimizer], capture_output=True, text=True, check=True
    )
    result = Comparison(**json.loads(done.stdout))
    ALL.append(result)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


def _plain_process(optimizer: str) -> None:
    makers = _sides(optimizer, [784, 1000, 10], 60, "cpu")
    sides = {name: makers[name]() for name in _ALONE}
    name = f"drtp 784-1000-10 batch 60 {optimizer} cpu, plain process"
    print(json.dumps(dataclasses.asdict(compare(name, sides, rounds=30, inner=20))))


if __name__ == "__main__":
    _plain_process(sys.argv[1])
