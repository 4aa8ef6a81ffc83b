"""Where an error goes below a max pooling: to torch's own winners, ties, infinities and NaN included.

Through the identity and with β = 1, e is d itself at the size of z, so that it can be compared bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

from .conv_layers import ORDERS, POOLINGS, pooled
from .test_ekdaa import MAP, check_error, pooled_size, tensors
from .tolerances import to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

CHANNELS = 18


def ties(device: str, pool: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Whole numbers: d, and maps of three values."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randint(-1, 2, (2, CHANNELS, *MAP), generator=generator).float()
    change = torch.randint(-3, 4, (2, CHANNELS, *pooled_size(pool)), generator=generator).float()
    return change.to(device), z.to(device)


def put_extremes(z: Tensor) -> None:
    """Values that are not finite, of another kind in each third of the channels; some maps have none."""
    z[:, 0:6:2, :4, :5] = -torch.inf
    z[1, 3:6] = -torch.inf
    z[:, 6:12:2, 1:3, 2:4] = torch.inf
    for sample, channel in np.ndindex(2, 6):  # one a map, so that no window holds two
        row, column = 3 * sample + channel, 2 * sample + channel
        z[sample, 12 + channel, row % MAP[0], column % MAP[1]] = torch.nan


def by_autograd(change: Tensor, z: Tensor, pool: dict[str, Any]) -> Tensor:
    """What torch's max pooling carries down."""
    leaf = z.cpu().clone().requires_grad_()
    return torch.autograd.grad(F.max_pool2d(leaf, **pool), leaf, change.cpu())[0].to(z)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", POOLINGS)
def test_winners_are_those_of_torch(name: str, order: torch.memory_format, target: Target) -> None:
    """Of equal values the first wins, inside the map even where all are -inf; a NaN wins."""
    backend, device = target
    pool = POOLINGS[name]
    change, z = ties(device, pool)
    put_extremes(z)
    wanted = by_autograd(change, z, pool)
    z, change = (m.contiguous(memory_format=order) for m in (z, change))
    how: dict[str, Any] = {"beta": 1.0, "activation": "identity", "pool": pooled(pool)}
    assert torch.equal(bk.ekdaa_error(change, z, **how, backend=backend), wanted)
    kernel = torch.eye(CHANNELS, device=device)[..., None, None]
    whole = bk.ekdaa_conv_error(change, kernel, z, **how, backend=backend)
    assert torch.equal(whole, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["2", "overlapping", "padding"])
def test_what_is_not_finite_goes_where_it_belongs(name: str, value: float, target: Target) -> None:
    """One bad number of d reaches its window's winner, and no other unit."""
    backend, device = target
    pool = POOLINGS[name]
    change, z = ties(device, pool)
    change[1, 4, 1, 2] = value
    how: dict[str, Any] = {"beta": 1.0, "activation": "identity", "pool": pooled(pool)}
    got = bk.ekdaa_error(change, z, **how, backend=backend)
    torch.testing.assert_close(got, by_autograd(change, z, pool), rtol=0, atol=0, equal_nan=True)
    assert (~got.isfinite()).sum() == 1


@pytest.mark.parametrize("pool", [None, "2"])
def test_a_nan_shows(pool: str | None, target: Target) -> None:
    """A pre-activation that is NaN has an error that is NaN, and its neighbours none of it."""
    backend, device = target
    window = POOLINGS[pool] if pool else None
    size = pooled_size(window)
    change, z = tensors(torch.float32, device, (2, 3, *size), (2, 3, *MAP))
    z[0, 1, 2, 3] = z[1, 2, 5, 0] = torch.nan
    kernel = torch.eye(3, device=device)[..., None, None]
    got = bk.ekdaa_error(change, z, pool=pooled(window), backend=backend)
    whole = bk.ekdaa_conv_error(change, kernel, z, pool=pooled(window), backend=backend)
    assert torch.equal(got.isnan(), z.isnan())
    assert torch.equal(whole.isnan(), z.isnan())
    matrix = bk.ekdaa_linear_error(
        change[:, :, 1, 0], kernel[..., 0, 0], z[:, :, 5, 0], backend=backend
    )
    assert torch.equal(matrix.isnan(), z[:, :, 5, 0].isnan())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["2", "overlapping", "one unit"])
def test_bilinear(name: str, order: torch.memory_format, backend: str | None) -> None:
    """E2: interpolated between the pooled units, by the reference, which is the default for it."""
    pool = POOLINGS[name]
    change, z = tensors(torch.float64, "cpu", (2, 3, *pooled_size(pool)), (2, 3, *MAP))
    z = z.contiguous(memory_format=order)
    how: dict[str, Any] = {"beta": 0.7, "upsample": "bilinear"}
    options = {**how, "pool": pooled(pool), "backend": backend}
    kernel = torch.eye(3, dtype=z.dtype)[..., None, None]
    for got in (
        bk.ekdaa_error(change, z, **options), bk.ekdaa_conv_error(change, kernel, z, **options)
    ):  # fmt: skip
        check_error(got, z, to_numpy(change), change, pool=pool, **how)
        assert got.is_contiguous(memory_format=order)
