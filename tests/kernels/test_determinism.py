"""The same call gives the same bits: again, and with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases
from .cases import FAMILIES
from .invertible_layers import Drawn, Layer, draw

Target = tuple[str, str]
Results = Callable[[Target, torch.dtype], list[Tensor]]

LARGE = (128, 300, 257, 5)
MEDIUM = (19, 70, 37, 5)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(
    family: str, shape: tuple[int, int, int, int], target: Target, dtype: torch.dtype
) -> list[Tensor]:
    """All that a family's ops compute: outputs, gradients, parameters and state after two steps."""
    backend, device = target
    case = FAMILIES[family](shape, dtype, device)
    results = list(case.grad(backend))
    rule = bk.Adam(lr=0.05)
    state = rule.new_state(case.weight, case.bias)
    for _ in range(2):
        results += case.step(rule, state, backend)
    return [*results, case.weight, case.bias, state.weight.m, state.weight.v, state.bias.v]


def elementwise(target: Target, dtype: torch.dtype) -> list[Tensor]:
    """The signal of a map, its change and error, an update of a parameter, and forward passes."""
    backend, device = target
    generator = torch.Generator().manual_seed(0)
    z, feedback, param = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((3, 70_000 if backend != "triton" else 700), (2, 0), (5, 331))
    )
    feedback = z[:2] * 2
    labels = torch.tensor([1, 0, 1], device=device)
    results = list(bk.drtp_signal(z, feedback, labels, backend=backend))
    results.append(bk.pepita_difference(z, z.cos(), backend=backend))
    maps = z[:, :600].view(3, 6, 10, 10)
    results.append(bk.pepita_max_pool(maps, 3, maps.cos(), stride=2, backend=backend))
    results.append(
        bk.pepita_difference(z, z[:, :2] / 8, basis=feedback, activation="tanh", backend=backend)
    )
    results += errors(maps, param, backend)
    bk.apply_update(param, param.cos(), bk.SGD(0.1), scale=0.5, max_norm=1.0, backend=backend)
    results += bk.dense_forward(param, param * 2, param[:, 0], backend=backend)
    results += bk.classifier_forward(param[:3], param, None, labels, backend=backend)
    return [*results, param]


def errors(maps: Tensor, matrix: Tensor, backend: str) -> list[Tensor]:
    """EKDAA's errors of maps below poolings, and of units below a dense layer."""
    found = []
    kernel = matrix[:4, :54].view(4, 6, 3, 3)
    for pool in (bk.MaxPool(2), bk.MaxPool(3, 2, 1)):
        entered = maps.cos()[:, :, :5, :5]
        found.append(bk.ekdaa_error(entered, maps, pool=pool, backend=backend))
        above = maps.sin()[:, :4, :5, :5]
        found.append(
            bk.ekdaa_conv_error(above, kernel, maps, padding=1, pool=pool, backend=backend)
        )
    found.append(bk.ekdaa_linear_error(matrix[:, :4], matrix[:4], matrix, backend=backend))
    return found


def inverses(target: Target, dtype: torch.dtype) -> list[Tensor]:
    """All that the ops of GAIT-prop compute, on more than one block of everything."""
    backend, device = target
    layer = Layer(9, 33, (9, 7), (2, 2), {"padding": "same"})
    t = Drawn(*(value.to(device) for value in vars(draw(layer, dtype, "cpu")).values()))
    reconstructed = bk.invertible_conv_reconstruct(
        t.output, t.x, t.inverse, t.bias, target=t.target, rate=t.rate, **layer.place,
        backend=backend,
    )  # fmt: skip
    error = bk.invertible_conv_error(
        t.output[:, :33], t.inverse[:33], layer.size, gate=t.x, **layer.place, backend=backend
    )
    if dtype.itemsize < 4:  # too few digits for an inverse
        return [reconstructed, error]
    gram = bk.orthogonality(t.weight, backend=backend)
    signal = t.output.transpose(0, 1).flatten(1).t()
    rule = bk.AdamW(0.05)
    state = rule.new_param_state(t.weight)
    found = [gram, reconstructed, error]
    found += bk.solve_nearly_orthogonal(signal, gram, backend=backend)
    found += bk.refine_inverse(t.weight, t.inverse, backend=backend)
    grad = t.inverse.cos()
    bk.orthogonal_update(t.weight, grad, gram, rule, state, penalty=0.5, backend=backend)
    return [*found, t.weight, state.m, state.v]


def same_bits(results: list[Tensor], others: list[Tensor]) -> bool:
    """Whether every entry is equal, NaN included nowhere."""
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_again(family: str, target: Target, dtype: torch.dtype) -> None:
    """Twice the same call, twice the same bits."""
    shape = cases.SMALL if target == ("triton", "cpu") else MEDIUM
    first = everything(family, shape, target, dtype)
    assert same_bits(first, everything(family, shape, target, dtype))


def test_elementwise_again(target: Target, dtype: torch.dtype) -> None:
    """Twice the same bits of what belongs to no family."""
    assert same_bits(elementwise(target, dtype), elementwise(target, dtype))


@pytest.mark.op("invertible_conv_error")
def test_inverses_again(target: Target, dtype: torch.dtype) -> None:
    """Twice the same call, twice the same bits, of the ops that have other bodies."""
    assert same_bits(inverses(target, dtype), inverses(target, dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype_of_layer", [torch.float32, torch.float64])
@pytest.mark.parametrize("results", [elementwise, inverses])
def test_number_of_threads_elsewhere(results: Results, dtype_of_layer: torch.dtype) -> None:
    """How the work is shared out must not show in the result of what belongs to no family."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    runs: list[list[Tensor]] = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append(results(("cpp", "cpu"), dtype_of_layer))
    assert all(same_bits(runs[0], run) for run in runs[1:])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape_of_layer", [MEDIUM, LARGE, (257, 17, 1, 3), (1, 300, 257, 2)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype_of_layer", [torch.float32, torch.float64])
def test_number_of_threads(
    family: str, dtype_of_layer: torch.dtype, shape_of_layer: tuple[int, int, int, int]
) -> None:
    """How the work is shared out must not show in the result."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    runs: list[list[Any]] = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append(everything(family, shape_of_layer, ("cpp", "cpu"), dtype_of_layer))
    assert all(same_bits(runs[0], run) for run in runs[1:])


@pytest.mark.usefixtures("poisoned")
def test_poison() -> None:
    """The fixture that the other tests rely on really fills fresh memory with NaN."""
    assert torch.isnan(torch.empty(3)).all()
    assert torch.isnan(torch.zeros(3).new_empty(4, 5)).all()
