"""GAIT-prop: a training step of the paper's dense nets, and reconstruction through invertible convolutions.

pytest benchmarks/bench_invertible_conv.py --results docs/results/cpu-invertible_conv
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from compare import NOTES, Step, compare, graphed, relative_error
from gait_formulations import backprop_step, difference_gradients, difference_step, layers_of
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import bpfree
import bpfree_kernels as bk
from bpfree.diagnostics import update_angles
from bpfree.models import build_model
from bpfree.nn import InvertibleConv2d
from bpfree.plain import PlainGAIT

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH, CLASSES, PENALTY = 64, 10, 100.0
WARM_STEPS = 50  # so that the weights are as far from orthogonal as in training

devices = pytest.mark.parametrize("device", DEVICES)


def _adam(model: nn.Module, **options: bool) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=1.9e-5, eps=1e-6, **options)


def _batch(device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, 32, 32, device=device)
    return x, torch.randint(0, CLASSES, (BATCH,), device=device)


def _trained(name: str, device: str) -> nn.Sequential:
    """The paper's net after some steps, its weights no longer orthogonal."""
    torch.manual_seed(0)
    model = build_model(name, (3, 32, 32), CLASSES).to(device)
    learner = bpfree.GAITProp(model, _adam(model), orthogonal_penalty=PENALTY)
    for _ in range(WARM_STEPS):
        learner.step(torch.rand(BATCH, 3, 32, 32, device=device), _batch(device)[1])
    return model


def _gradient_error(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, float]:
    """Of our gradients and of eager float32's, against float64; the worst layer's."""
    learner = bpfree.GAITProp(deepcopy(model))
    learner.loss_grads(x, y)
    layers = layers_of(model)

    def formula(dtype: torch.dtype) -> list[Tensor]:
        weights, biases = (
            [getattr(la, n).detach().to(dtype) for la in layers] for n in ("weight", "bias")
        )
        return [
            g
            for g, _ in difference_gradients(
                weights, biases, x.flatten(1).to(dtype), y, CLASSES, 0.0
            )
        ]

    exact = formula(torch.float64)
    ours = [layer.weight.grad for layer in layers_of(learner.model)]
    sides = {"ours": ours, "the formula in torch": formula(torch.float32)}
    return {
        side: max(relative_error(g, e) for g, e in zip(found, exact, strict=True))
        for side, found in sides.items()
    }


@devices
@pytest.mark.parametrize("name", ["gait-shallow", "gait-deep"])
def test_step(benchmark: BenchmarkFixture, name: str, device: str) -> None:
    """A step at batch 64 with the regulariser of the paper, Adam."""
    model = _trained(name, device)
    x, y = _batch(device)
    errors = _gradient_error(model, x, y)
    ours, plain, closed, autograd, eager, compiled = (deepcopy(model) for _ in range(6))
    learner = bpfree.GAITProp(ours, _adam(ours), orthogonal_penalty=PENALTY)
    authors = PlainGAIT(plain, _adam(plain), orthogonal_penalty=PENALTY)
    steps = {
        "backprop, regulariser as a loss": backprop_step(
            autograd, _adam(autograd, fused=True), PENALTY, closed=False
        ),
        "backprop, regulariser in closed form": backprop_step(
            closed, _adam(closed, fused=True), PENALTY, closed=True
        ),
        "the formula in torch": difference_step(
            eager, _adam(eager, fused=True), CLASSES, PENALTY, compiled=False
        ),
        "torch.compile of it": difference_step(
            compiled, _adam(compiled, fused=True), CLASSES, PENALTY, compiled=True
        ),
    }
    sides: dict[str, Step] = {
        "ours": lambda: learner.step(x, y),
        "authors' formulation, float64": lambda: authors.step(x, y),
        **{side: (lambda step=step: step(x, y)) for side, step in steps.items()},
    }
    result = compare(
        f"{name}, batch {BATCH} {device}", sides, device=device, rounds=9, inner=1, errors=errors
    )
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(sides["ours"], rounds=5, iterations=1)


def _inverse_note(model: nn.Sequential) -> str:
    weight = layers_of(model)[1].weight.detach()
    off = bk.orthogonality(weight)
    size = torch.linalg.matrix_norm(off, 2).item()
    solution = bk.solve_nearly_orthogonal(torch.randn(BATCH, len(weight)).to(weight), off)
    return (
        f"After {WARM_STEPS} steps the largest singular value of W Wᵀ − I of the second layer is {size:.3f}; "
        f"the series reaches a residual of {solution.residual.item():.0e}."
    )


@devices
def test_inverse(benchmark: BenchmarkFixture, device: str) -> None:
    """v W⁻ᵀ for a batch, with all that has to be made of W first."""
    model = _trained("gait-shallow", device)
    NOTES.append(_inverse_note(model))
    weight = layers_of(model)[1].weight.detach().clone()
    signal = torch.randn(BATCH, len(weight), device=device)
    exact = torch.linalg.solve(weight.double(), signal.double().t()).t()
    start = torch.linalg.inv(weight).t().contiguous()
    off = bk.orthogonality(weight)

    def series(given: Tensor | None = None) -> Tensor:
        g = bk.orthogonality(weight) if given is None else given
        return bk.solve_nearly_orthogonal(signal, g).value @ weight

    def refined() -> Tensor:
        return signal @ bk.refine_inverse(weight, start).value

    sides: dict[str, Step] = {
        "series": series,
        "series, W Wᵀ − I known": lambda: series(off),
        "inverse refined once": refined,
        "torch.linalg.inv": lambda: signal @ torch.linalg.inv(weight).t(),
        "torch.linalg.solve": lambda: torch.linalg.solve(weight, signal.t()).t(),
        "bare product": lambda: signal @ weight,
    }
    errors = {side: relative_error(sides[side](), exact) for side in list(sides)[:-1]}
    result = compare(
        f"inverse of 1024 units applied to {BATCH} rows {device}", sides, device=device, rounds=15,
        inner=1, errors=errors,
    )  # fmt: skip
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(series, rounds=5, iterations=1)


RECONSTRUCTIONS = {
    "16 channels, 3x3, 32x32": (16, 3, 1, 32, 16),
    "32 channels, 3x3, 16x16": (32, 3, 1, 16, 32),
    "64 channels, 3x3 by 2, 16x16": (64, 3, 2, 16, 16),
    "16 channels, 5x5 by 2, 32x32": (16, 5, 2, 32, 16),
}


@devices
@pytest.mark.parametrize("size", RECONSTRUCTIONS)
def test_reconstruction(benchmark: BenchmarkFixture, size: str, device: str) -> None:
    """The input from the output, against the transposed convolution that it contains."""
    channels, kernel, stride, side, batch = RECONSTRUCTIONS[size]
    torch.manual_seed(0)
    out, padding = channels * kernel**2, kernel // 2
    weight = nn.init.orthogonal_(torch.empty(out, channels, kernel, kernel)).to(device)
    bias = torch.randn(out, device=device)
    x = torch.randn(batch, channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    z = F.conv2d(x, weight, bias, stride, padding)
    y = F.leaky_relu(z, 0.1)
    left = side - ((z.shape[2] - 1) * stride - 2 * padding + kernel)

    def carried(v: Tensor) -> Tensor:
        return F.conv_transpose2d(v, weight, None, stride, padding, left)

    times = carried(F.conv2d(torch.ones_like(x), weight, None, stride, padding))

    def formula() -> Tensor:
        back = torch.where(y > 0, y, y / 0.1) - bias.view(-1, 1, 1)
        return carried(back) - (times - 1) * x

    def ours() -> Tensor:
        return bk.invertible_conv_reconstruct(
            y, x, weight, bias, stride=stride, padding=padding, slope=0.1
        )

    sides: dict[str, Step] = {
        "ours": ours,
        "bare conv_transpose2d": lambda: carried(y),
        "the formula in torch": formula,
        "torch.compile of it": torch.compile(formula),
    }
    if device == "cuda":
        sides = {"ours, graph": graphed(ours), **sides}
    result = compare(
        f"reconstruction, {size}, batch {batch} {device}", sides, device=device, rounds=25, inner=4,
        errors={"ours": relative_error(ours(), x), "the formula in torch": relative_error(formula(), x)},
    )  # fmt: skip
    benchmark.extra_info.update({side: result.ratio(side) for side in result.medians})
    benchmark.pedantic(ours, rounds=5, iterations=1)


def _stack(depth: int) -> list[InvertibleConv2d]:
    torch.manual_seed(0)
    return [InvertibleConv2d(3, 3, padding=1, features=3) for _ in range(depth)]


@torch.no_grad()
def _round_trip(slope: float) -> float:
    """Largest error of an image that comes back through six layers, each undone from what came down."""
    stack, inputs = _stack(6), [torch.rand(8, 3, 32, 32)]
    for layer in stack:
        inputs.append(F.leaky_relu(layer(inputs[-1]), slope))
    back = inputs[-1]
    for layer, entered in zip(reversed(stack), reversed(inputs[:-1]), strict=True):
        back = layer.inverse(torch.where(back > 0, back, back / slope), entered)
    return float((back - inputs[0]).abs().max())


def test_exactness(benchmark: BenchmarkFixture) -> None:
    """Angle to backprop at orthogonal weights, and an input through a deep stack and back, in float32."""
    torch.manual_seed(0)
    model = build_model("gait-deep", (3, 32, 32), CLASSES)
    x, y = _batch("cpu")
    angles = update_angles(bpfree.GAITProp(model), x, y)
    NOTES.append(
        "Angle between the updates of gait-deep and backprop's at orthogonal weights, float32, largest of "
        f"its layers: {max(angles.values()):.1e} degrees."
    )
    for slope in (1.0, 0.5, 0.1):
        NOTES.append(
            "An image through six invertible convolutions (3x3 by 1, 3 of 27 channels handed on), leaky "
            f"ReLUs of slope {slope} between them, and back, float32: largest error {_round_trip(slope):.1e}."
        )
    benchmark.extra_info.update(angles)
    benchmark.pedantic(update_angles, args=(bpfree.GAITProp(model), x, y), rounds=1, iterations=1)
