"""PEPITA's difference f(z + Δz) − f(z), entry by entry, from the smallest steps to the largest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import golden_pepita, plain
from .cases import default_slope
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]


def entries(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Pre-activations and steps, every one with every one: kinks, saturation, tiny and huge steps."""
    eps = torch.finfo(dtype).eps
    sizes = [0.0, 0.25, 0.5, 1.0, 1 + eps, 1 - eps, 2.0, 3.0, 9.0, 20.0, 1e4]
    sweep = torch.linspace(0.1, 6, 13, dtype=torch.float64).tolist()
    steps = [0.0, 1e-4, 0.01, 0.25, 0.5, 0.499, 0.75, 1.0, 2.0, 20.0, 40.0, 1e4]
    z, step = (
        torch.tensor([*values, *(-value for value in values)], dtype=torch.float64)
        for values in ([*sizes, *sweep], steps)
    )
    z, step = (
        value.flatten().to(device, dtype) for value in torch.meshgrid(z, step, indexing="ij")
    )
    return z, step


def check_entries(got: Tensor, z: Tensor, step: Tensor, activation: str, slope: float) -> None:
    """Compare f(z + Δz) − f(z) entry by entry, each with a tolerance of its own.

    In proportion to the change itself; but where f is curved 1 − f² has lost digits, in proportion
    to the step.
    """
    arrays = to_numpy(z), to_numpy(step)
    exact = golden_pepita.difference(*arrays, activation, slope)
    scale = np.abs(exact)
    if activation in ("tanh", "sigmoid"):
        scale = scale + np.minimum(np.abs(arrays[1]), 1)
    by_torch = torch.from_numpy(exact).to(got.device, got.dtype)
    assert not got.isnan().any()
    check(f"change of {activation}", got.flatten(), exact, by_torch, scale=scale)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_entries(activation: str, slope: float | None, target: Target, dtype: torch.dtype) -> None:
    """P7: the difference of every activation, far out and near its kinks, in the op for maps."""
    backend, device = target
    z, step = entries(dtype, device)
    got = bk.pepita_difference(
        z[None], step[None], activation=activation, slope=slope, backend=backend
    )
    check_entries(got, z, step, activation, default_slope(activation, slope))


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_entries_of_a_layer(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """… and inside the fused layer: one input that changes by 1, and the steps as the weight."""
    backend, device = target
    z, step = entries(dtype, device)
    if target == (
        "triton",
        "cpu",
    ):  # some steps for every pre-activation, as the interpreter is slow
        z, step = z[::17], step[::17]
    one = z.new_ones(1, 1)
    got, _, grad_bias = bk.pepita_linear_grad(
        z[None], one, one, step[:, None], torch.zeros_like(step), activation=activation,
        slope=slope, backend=backend,
    )  # fmt: skip
    check_entries(got, z, step, activation, default_slope(activation, slope))
    check_entries(-grad_bias, z, step, activation, default_slope(activation, slope))


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_nan_stays(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """A NaN does not become a unit that is off. (Without f in between, Δz alone is the change.)"""
    backend, device = target
    nan = float("nan")
    z = torch.tensor([nan, 0.5, -0.5, 9.0, nan, -9.0, 0.0, 1.0] * 5, dtype=dtype, device=device)
    step = torch.tensor([0.5, nan, nan, nan, nan, nan, nan, 0.5] * 5, dtype=dtype, device=device)
    wanted = step.isnan() if activation == "identity" else step.isnan() | z.isnan()
    options = {"activation": activation, "slope": slope, "backend": backend}
    got = bk.pepita_difference(z[None], step[None], **options)
    assert torch.equal(got[0].isnan(), wanted)
    one = z.new_ones(1, 1)
    results = bk.pepita_linear_grad(z[None], one, one, step[:, None], z.cos(), **options)
    for result in results:
        assert torch.equal(result.flatten().isnan(), wanted)


@pytest.mark.parametrize(("name", "whole"), [("tanh", 1.0), ("sigmoid", 0.5)])
def test_a_step_back_from_far_out(name: str, whole: float, target: Target) -> None:
    """To 0 and a little beyond, from where a sum has lost the place after the point."""
    backend, device = target
    z = torch.tensor([1e4, 1e8, 1e20, -1e8, 50.0, 50.0], device=device)
    step = torch.tensor([-1e4, -1e8, -1e20, 1e8, -100.0, -49.0], device=device)
    got = bk.pepita_difference(z[None], step[None], activation=name, backend=backend)[0].cpu()
    half = math.tanh(1.0) if name == "tanh" else 1 / (1 + math.exp(-1.0))
    wanted = torch.tensor([-whole, -whole, -whole, whole, -2 * whole, half - 1])
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "hardtanh"])
def test_cancellation_is_rejected(name: str) -> None:
    """… and entry by entry so does subtracting two activations in float32."""
    z, step = entries(torch.float32, "cpu")
    slope = default_slope(name, None)
    exact = golden_pepita.difference(to_numpy(z), to_numpy(step), name, slope)
    check_entries(torch.from_numpy(exact).float(), z, step, name, slope)
    subtracted = plain.activate(z + step, name, slope) - plain.activate(z, name, slope)
    with pytest.raises(AssertionError, match="change of"):
        check_entries(subtracted, z, step, name, slope)
