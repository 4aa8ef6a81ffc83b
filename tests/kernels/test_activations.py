"""Every activation and its slope, entry by entry, from the smallest to the largest arguments.

Through `drtp_signal` with a feedback of ones, which returns f and f′ themselves, and through the
dense op, whose kernels may have code of their own for it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, plain
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]

FROM_ONE_MINUS = ("tanh", "sigmoid")
"""Slopes defined as 1 − f² and f (1 − f): their rounding is relative to 1, not to their size."""


def arguments(dtype: torch.dtype, device: str) -> Tensor:
    """Zeros, the smallest numbers, bounds of the linear parts and neighbours, extremes, a sweep.

    Forwards and backwards, so that each lands in the body of a vector loop and in its tail.
    """
    info = torch.finfo(dtype)
    positive = [0.0, info.smallest_normal, info.eps, info.eps**0.5, 0.25, 0.5, 1.0, 1 + info.eps,
                1 - info.eps, 2.0, 2 + 2 * info.eps, 4.0, 9.0, 15.0, 20.0, 21.0, 88.0, 104.0, 710.0,
                1e4]  # fmt: skip
    sweep = torch.linspace(-12, 12, 83, dtype=torch.float64)
    z = torch.cat([torch.tensor(positive, dtype=torch.float64), sweep])
    z = torch.cat([z, -z])
    return torch.cat([z, z.flip(0)]).to(device, dtype)


def check_entries(results: tuple[Tensor, Tensor], z: Tensor, activation: str, slope: float) -> None:
    """Compare f(z) and f′(z) with float64, each entry with a tolerance of its own."""
    one = torch.zeros(1, dtype=torch.int64, device=z.device)
    exact = golden.activate(to_numpy(z), activation, slope)
    by_torch = plain.drtp_signal(z[None], torch.ones_like(z)[None], one, activation, slope)
    scales = np.abs(exact[0]), np.abs(exact[1])
    if activation in FROM_ONE_MINUS:
        scales = scales[0], np.ones_like(scales[1])
    for name, got, wanted, reference, scale in zip(
        ("f", "f′"), results, exact, by_torch, scales, strict=True
    ):
        check(f"{name} of {activation}", got.flatten(), wanted, reference[0], scale=scale)


@pytest.mark.parametrize(("activation", "slope"), CASES)
def test_signal(activation: str, slope: float | None, target: Target, dtype: torch.dtype) -> None:
    """f and f′ of a map."""
    backend, device = target
    z = arguments(dtype, device)
    results = bk.drtp_signal(
        z[None],
        torch.ones_like(z)[None],
        torch.zeros(1, dtype=torch.int64, device=device),
        activation=activation,
        slope=slope,
        backend=backend,
    )
    check_entries(results, z, activation, cases.default_slope(activation, slope))


@pytest.mark.parametrize(("activation", "slope"), CASES)
def test_dense(activation: str, slope: float | None, target: Target, dtype: torch.dtype) -> None:
    """f and f′ inside the fused layer: one input of 1, and the arguments as the weight."""
    backend, device = target
    z = arguments(dtype, device)
    output, _, grad_bias = bk.drtp_linear_grad(
        z.new_ones(1, 1),
        z[:, None],
        torch.zeros_like(z),
        torch.ones_like(z)[None],
        torch.zeros(1, dtype=torch.int64, device=device),
        activation=activation,
        slope=slope,
        backend=backend,
    )
    assert grad_bias is not None
    check_entries((output, grad_bias), z, activation, cases.default_slope(activation, slope))


@pytest.mark.parametrize(("activation", "slope"), CASES)
def test_infinity_and_nan(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """Infinite arguments have their limits; a NaN stays a NaN instead of becoming a dead unit."""
    backend, device = target
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([inf, -inf, nan] * 7, dtype=dtype, device=device)
    y, derivative = bk.drtp_signal(
        z[None],
        torch.ones_like(z)[None],
        torch.zeros(1, dtype=torch.int64, device=device),
        activation=activation,
        slope=slope,
        backend=backend,
    )
    given = cases.default_slope(activation, slope)
    limits = {
        "identity": ([inf, -inf, nan], [1, 1, 1]),
        "relu": ([inf, 0, nan], [1, 0, 0]),
        "leaky_relu": ([inf, -inf, nan], [1, given, given]),
        "tanh": ([1, -1, nan], [0, 0, nan]),
        "sigmoid": ([1, 0, nan], [0, 0, nan]),
        "hardtanh": ([1, -1, nan], [0, 0, 0]),
        "sign": ([1, -1, nan], [0, 0, 0]),
    }[activation]
    for got, wanted in zip((y, derivative), limits, strict=True):
        expected = torch.tensor([wanted * 7], dtype=dtype, device=device)
        rtol = torch.finfo(dtype).eps  # of a slope that the dtype does not hold exactly
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_hardtanh_keeps_its_gradient_at_the_bound(slope: float, target: Target) -> None:
    """|slope · z| = 1 still learns, and the next number beyond it does not."""
    backend, device = target
    bound = 1 / slope
    beyond = torch.nextafter(torch.tensor(bound), torch.tensor(torch.inf)).item()
    z = torch.tensor([[bound, -bound, beyond, -beyond, 0.0]], device=device)
    _, derivative = bk.drtp_signal(
        z,
        torch.ones_like(z),
        torch.zeros(1, dtype=torch.int64, device=device),
        activation="hardtanh",
        slope=slope,
        backend=backend,
    )
    assert derivative.tolist() == [[slope, slope, 0.0, 0.0, slope]]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("error", [1e-5, -1e-5])
def test_inexact_functions_are_rejected(activation: str, error: float) -> None:
    """The comparison has teeth: an approximation with five digits fails it in float32."""
    z = arguments(torch.float32, "cpu")
    values, slopes = golden.activate(to_numpy(z), activation, 0.0)
    right = torch.from_numpy(values).float(), torch.from_numpy(slopes).float()
    check_entries(right, z, activation, 0.0)
    with pytest.raises(AssertionError, match="f of"):
        check_entries((right[0] * (1 + error), right[1]), z, activation, 0.0)
    with pytest.raises(AssertionError, match="f′ of"):
        check_entries((right[0], right[1] + error), z, activation, 0.0)
