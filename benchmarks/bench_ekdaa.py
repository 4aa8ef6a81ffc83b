"""EKDAA: a convolution's backward against the same formula in torch, torch.compile of it, and backprop's;
a training step of the paper's Fashion-MNIST net.

    pytest benchmarks/bench_ekdaa.py --results docs/results/cpu-ekdaa
"""

from __future__ import annotations

import pytest
import torch
from compare import NOTES, Step, compare, graphed, relative_error
from ekdaa_formulations import (
    BETA,
    GAMMA,
    LR,
    MOMENTUM,
    Layer,
    backprop,
    bare,
    formula,
    make_layer,
    update,
)
from peak_memory import MEASURABLE, peak_extra
from pytest_benchmark.fixture import BenchmarkFixture

import bpfree
import bpfree_kernels as bk
from bpfree.models import build_model
from bpfree.plain import PlainEKDAA

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH, CHANNELS = 50, 64
SIZES = {"32x32": (32, False), "32x32, pooled to 16x16": (16, True)}

sizes = pytest.mark.parametrize("size", SIZES)
devices = pytest.mark.parametrize("device", DEVICES)


def _error(layer: Layer) -> torch.Tensor:
    pool = bk.MaxPool(2) if layer.pooled else None
    return bk.ekdaa_conv_error(
        layer.error, layer.feedback, layer.z, beta=BETA, padding=1, pool=pool
    )


def _learn(layer: Layer) -> None:
    state, of_feedback = (bk.ParamState(m=momentum) for momentum in layer.momenta)
    bk.conv_step(
        layer.error, layer.x, layer.weight, None, bk.SGD(LR, MOMENTUM),
        bk.LayerState(state, bk.ParamState()), feedback=layer.feedback, feedback_state=of_feedback,
        feedback_scale=GAMMA, padding=1,
    )  # fmt: skip


def _errors(layer: Layer, exact: Layer) -> dict[str, float]:
    below, gradient, _ = formula(exact)
    ours = bk.conv_grad(layer.error, layer.x, layer.weight, padding=1)[0]
    theirs = formula(layer)
    return {
        "ours": max(relative_error(_error(layer), below), relative_error(ours, gradient)),
        "the formula in torch": max(
            relative_error(theirs[0], below), relative_error(theirs[1], gradient)
        ),
    }


@devices
@sizes
def test_backward(benchmark: BenchmarkFixture, size: str, device: str) -> None:
    """Error kernel, up-sampling, target, error below, and what W and E learn."""
    side, pooled = SIZES[size]
    layer, exact = (
        make_layer(CHANNELS, side, BATCH, device, pooled=pooled, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    exact.z, exact.x, exact.error, exact.weight, exact.feedback = (
        t.double() for t in (layer.z, layer.x, layer.error, layer.weight, layer.feedback)
    )
    exact.winners = layer.winners
    errors = _errors(layer, exact)
    compiled = torch.compile(formula)

    def ours() -> None:
        _error(layer)
        _learn(layer)

    def with_update(make: object) -> Step:
        def run() -> None:
            _, of_weight, of_feedback = make(layer)
            update(layer, of_weight, of_feedback)

        return run

    sides: dict[str, Step] = {
        "ours": ours,
        "torch's convolution backward": lambda: bare(layer),
        "the formula in torch": with_update(formula),
        "torch.compile of it": with_update(compiled),
        "backprop's backward": lambda: backprop(layer),
        "ours, error alone": lambda: _error(layer),
        "ours, learning alone": lambda: _learn(layer),
    }
    if device == "cuda":
        sides = {"ours, graph": graphed(sides["ours"]), **sides}
    name = (
        f"ekdaa backward of {CHANNELS} to {CHANNELS} channels, 3x3, {size}, batch {BATCH} {device}"
    )
    result = compare(name, sides, device=device, rounds=15, inner=2, errors=errors)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)


def _net(device: str) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return build_model("ekdaa", (1, 28, 28), 10).to(device)


@devices
def test_step(benchmark: BenchmarkFixture, device: str) -> None:
    """A training step of 1-32-P-64-P-128-fc128-10 by each rule, SGD with momentum."""
    x = torch.rand(BATCH, 1, 28, 28, device=device)
    y = torch.randint(0, 10, (BATCH,), device=device)

    def make(rule: type[bpfree.Learner]) -> bpfree.Learner:
        model = _net(device)
        return rule(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM), loss="ce")

    learner = make(bpfree.EKDAA)
    learner.step(x, y)
    model = _net(device)
    plain = PlainEKDAA(
        model, learner.feedback, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    )
    others = {"backprop": make(bpfree.BP), "FA": make(bpfree.FRFB)}
    sides: dict[str, Step] = {
        "ours": lambda: learner.step(x, y),
        "the formula in torch": lambda: plain.step(x, y),
        **{name: (lambda other=other: other.step(x, y)) for name, other in others.items()},
    }
    if device == "cuda":
        sides = {"ours, graph": graphed(sides["ours"]), **sides}
    name = f"training step of the paper's Fashion-MNIST net, batch {BATCH} {device}"
    result = compare(name, sides, device=device, rounds=15, inner=3)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)


_STEP = """
import torch, bpfree
from bpfree.models import build_model
torch.manual_seed(0)
model = build_model("ekdaa", (1, 28, 28), 10)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
learner = {"ekdaa": bpfree.EKDAA, "bp": bpfree.BP}[sys.argv[1]](model, optimizer, loss="ce")
x, y = torch.rand(50, 1, 28, 28), torch.randint(0, 10, (50,))
run = lambda: learner.step(x, y)
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_memory(benchmark: BenchmarkFixture) -> None:
    peaks = {rule: peak_extra(_STEP, rule) for rule in ("ekdaa", "bp")}
    NOTES.append(
        "Peak extra memory of a training step of the paper's Fashion-MNIST net, batch 50: "
        f"{peaks['ekdaa'] / 2**20:.1f} MiB, with backprop {peaks['bp'] / 2**20:.1f} MiB "
        f"({peaks['ekdaa'] / peaks['bp']:.2f} times)."
    )
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(peak_extra, args=(_STEP, "ekdaa"), rounds=1, iterations=1)
