"""Locally connected layers: forward, update, feedback and masks against unfold + bmm, torch.compile of it,
the broadcast recipe, the bare batched products, and the tied convolution of the same size.

    pytest benchmarks/bench_local_conv.py --results docs/results/cpu-local_conv
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import NOTES, Step, compare, graphed, relative_error
from local_conv_formulations import (
    Layer,
    bare_products,
    broadcast_forward,
    by_position,
    make_layer,
    unfold_forward,
    unfold_step,
)
from peak_memory import MEASURABLE, peak_extra
from pytest_benchmark.fixture import BenchmarkFixture

import bpfree_kernels as bk

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH, LR = 50, 1e-6
SIZES = {"3to32": (3, 32, 32, 5), "64to64": (64, 64, 16, 3)}

sizes = pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
devices = pytest.mark.parametrize("device", DEVICES)


def _name(what: str, size: tuple[int, int, int, int], device: str) -> str:
    inputs, outputs, side, kernel = size
    shape = f"{inputs} to {outputs} channels, {side}x{side}, {kernel}x{kernel}"
    return f"local_conv {what} {shape}, batch {BATCH} {device}"


def _compare(
    benchmark: BenchmarkFixture,
    name: str,
    sides: dict[str, Step],
    device: str,
    errors: dict[str, float],
) -> None:
    if device == "cuda":
        sides = {"ours, graph": graphed(sides["ours"]), **sides}
    result = compare(name, sides, device=device, rounds=15, inner=3, errors=errors)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)


def _forward(layer: Layer) -> torch.Tensor:
    return bk.local_conv_forward(layer.x, layer.weight, padding=layer.padding).z


def _errors_of_forward(layer: Layer) -> dict[str, float]:
    exact = Layer(layer.x.cpu().double(), layer.weight.cpu().double(), layer.signal.cpu().double())
    z = _forward(exact)
    unfolded = unfold_forward(layer, layer.x, by_position(layer))
    return {"ours": relative_error(_forward(layer), z), "unfold + bmm": relative_error(unfolded, z)}


@devices
@sizes
def test_forward(benchmark: BenchmarkFixture, size: tuple[int, int, int, int], device: str) -> None:
    layer = make_layer(*size, BATCH, device)
    places, weight, _ = bare_products(layer, update=False)
    compiled = torch.compile(unfold_forward)
    tied = layer.weight[0, 0].permute(3, 2, 0, 1).contiguous()
    sides: dict[str, Step] = {
        "ours": lambda: _forward(layer),
        "bare batched product (torch.bmm)": lambda: torch.bmm(places, weight),
        "unfold + bmm": lambda: unfold_forward(layer, layer.x, weight),
        "torch.compile of it": lambda: compiled(layer, layer.x, weight),
        "tied conv2d": lambda: F.conv2d(layer.x, tied, padding=layer.padding),
    }
    _compare(benchmark, _name("forward", size, device), sides, device, _errors_of_forward(layer))


@devices
def test_forward_by_broadcasting(benchmark: BenchmarkFixture, device: str) -> None:
    size = SIZES["3to32"]  # the other one would need 2 GB for the product
    layer = make_layer(*size, BATCH, device)
    weight = by_position(layer)
    sides: dict[str, Step] = {
        "ours": lambda: _forward(layer),
        "broadcast recipe": lambda: broadcast_forward(layer, layer.x, weight),
    }
    result = compare(_name("forward", size, device), sides, device=device, rounds=3, inner=1)
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)


def _gradient_errors(layer: Layer) -> dict[str, float]:
    def gradient(x: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        like = torch.empty_like(layer.weight, dtype=x.dtype, device=x.device)
        return bk.local_conv_grad(signal, x, like, padding=layer.padding)[0]

    exact = gradient(layer.x.cpu().double(), layer.signal.cpu().double())
    return {"ours": relative_error(gradient(layer.x, layer.signal), exact)}


@devices
@sizes
def test_forward_and_update(
    benchmark: BenchmarkFixture, size: tuple[int, int, int, int], device: str
) -> None:
    layer = make_layer(*size, BATCH, device)
    rule, padding = bk.SGD(LR), layer.padding

    def ours() -> None:
        _forward(layer)
        bk.local_conv_step(layer.signal, layer.x, layer.weight, None, rule, padding=padding)

    places, weight, posts = bare_products(layer, update=True)
    places_t = places.transpose(1, 2)

    def bare() -> None:
        torch.bmm(places, weight)
        torch.baddbmm(weight, places_t, posts, alpha=-LR, out=weight)

    other, parameter = by_position(layer), by_position(layer).requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=LR, fused=True)

    def autograd() -> None:
        optimizer.zero_grad()
        unfold_forward(layer, layer.x, parameter).backward(layer.signal)
        optimizer.step()

    sides: dict[str, Step] = {
        "ours": ours,
        "bare batched products": bare,
        "unfold + bmm + baddbmm": lambda: unfold_step(layer, layer.x, other, layer.signal, LR),
        "unfold + bmm, autograd, fused SGD": autograd,
    }
    name = _name("forward + update", size, device)
    _compare(benchmark, name, sides, device, _gradient_errors(layer))


@devices
@sizes
def test_feedback_and_masks(
    benchmark: BenchmarkFixture, size: tuple[int, int, int, int], device: str
) -> None:
    """A whole training step of a layer: forward, signal down, update; with R beside W, and with masks."""
    layer = make_layer(*size, BATCH, device)
    rule, padding, weight = bk.SGD(LR), layer.padding, layer.weight
    feedback = torch.randn_like(weight) / 100
    of_weight, of_feedback = torch.rand_like(weight) < 0.5, torch.rand_like(weight) < 0.5
    field = torch.randn_like(layer.x)

    def step(
        down: torch.Tensor, gate: torch.Tensor | None, update: dict[str, torch.Tensor]
    ) -> Step:
        def run() -> None:
            _forward(layer)
            bk.local_conv_feedback(
                layer.signal, down, layer.x.shape[2:], gate=gate, activation="hardtanh",
                padding=padding,
            )  # fmt: skip
            bk.local_conv_step(layer.signal, layer.x, weight, None, rule, padding=padding, **update)

        return run

    masks = {"weight_mask": of_weight}
    both = {**masks, "feedback": feedback, "feedback_mask": of_feedback}
    sides: dict[str, Step] = {
        "ours": step(weight, None, {}),
        "down through R, gated": step(feedback, field, {}),
        "mask on W": step(weight, None, masks),
        "R learns, too": step(feedback, field, {"feedback": feedback}),
        "R learns, masks on both": step(feedback, field, both),
    }
    name = _name("training step, plain and with options", size, device)
    _compare(benchmark, name, sides, device, _gradient_errors(layer))


_LAYER = """
sys.path.insert(0, "benchmarks")
import torch, bpfree_kernels as bk
from local_conv_formulations import by_position, make_layer, unfold_step
side, *size = sys.argv[1], *map(int, sys.argv[2:])
layer = make_layer(*size, "cpu")
weight = by_position(layer) if side == "unfold" else None
def ours():
    bk.local_conv_forward(layer.x, layer.weight, padding=layer.padding)
    bk.local_conv_step(
        layer.signal, layer.x, layer.weight, None, bk.SGD(1e-6), padding=layer.padding
    )
def unfold():
    unfold_step(layer, layer.x, weight, layer.signal, 1e-6)
run = {"ours": ours, "unfold": unfold}[side]
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
@sizes
def test_memory(benchmark: BenchmarkFixture, size: tuple[int, int, int, int]) -> None:
    inputs, _, side, _ = size
    peaks = {name: peak_extra(_LAYER, name, *size, BATCH) for name in ("ours", "unfold")}
    NOTES.append(
        f"Peak extra memory of {_name('forward + update', size, 'cpu')}: "
        f"{peaks['ours'] / 2**20:.1f} MiB, with unfold {peaks['unfold'] / 2**20:.1f} MiB; the input has "
        f"{BATCH * inputs * side * side * 4 / 2**20:.1f} MiB."
    )
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(peak_extra, args=(_LAYER, "ours", *size, BATCH), rounds=1, iterations=1)
