"""PEPITA's max pooling: torch's, and its change without cancellation, in every layout and geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True, "padding": (0, 1)},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
]


def maps(device: str, *shape: int, last: bool = False) -> tuple[Tensor, Tensor]:
    """Whole numbers, so that windows have ties and sums are exact; and a change of them."""
    generator = torch.Generator().manual_seed(5)
    y, change = (torch.randint(-3, 4, shape, generator=generator).float() for _ in range(2))
    order = torch.channels_last if last else torch.contiguous_format
    return tuple(t.to(device).contiguous(memory_format=order) for t in (y, change))  # type: ignore[return-value]


def by_places(y: Tensor, change: Tensor, **geometry: Any) -> Tensor:
    """(y + Δy)[i′] − y[i], from torch's own places of the maxima."""
    size = geometry.pop("kernel_size")
    places = [F.max_pool2d(t, size, **geometry, return_indices=True)[1] for t in (y, y + change)]

    def at(values: Tensor, where: Tensor) -> Tensor:
        return values.flatten(2).gather(2, where.flatten(2)).view(where.shape)

    return at(change, places[1]) + (at(y, places[1]) - at(y, places[0]))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_values(geometry: dict[str, Any], channels: int, last: bool, target: Target) -> None:
    backend, device = target
    y, change = maps(device, 2, channels, 8, 7, last=last)
    pooled = bk.pepita_max_pool(y, **geometry, backend=backend)
    moved = bk.pepita_max_pool(y, change=change, **geometry, backend=backend)
    torch.testing.assert_close(pooled, F.max_pool2d(y, **geometry), rtol=0, atol=0)
    torch.testing.assert_close(moved, by_places(y.cpu(), change.cpu(), **geometry).to(device))
    after = F.max_pool2d(y + change, **geometry)
    torch.testing.assert_close(pooled + moved, after, rtol=0, atol=0)
    if last and channels > 1:
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        assert moved.is_contiguous(memory_format=torch.channels_last)


def test_a_small_change_keeps_its_digits(target: Target) -> None:
    backend, device = target
    y = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(device) + 1
    change = 1e-6 * torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    got = bk.pepita_max_pool(y, 2, change, backend=backend)
    y64, change64 = y.double(), change.double()
    exact = F.max_pool2d(y64 + change64, 2) - F.max_pool2d(y64, 2)
    subtracted = F.max_pool2d(y + change, 2) - F.max_pool2d(y, 2)
    error = (got - exact).norm() / exact.norm()
    assert error < 1e-6
    assert (subtracted - exact).norm() / exact.norm() > 1e3 * error


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_nan_and_infinity(last: bool, target: Target) -> None:
    backend, device = target
    y, _ = maps(device, 2, 20, 4, 4, last=last)
    y[0, 3, 0, 1] = torch.nan
    y[0, 4, 2, 2] = torch.inf
    y[1, 5, :2, :2] = -torch.inf
    pooled = bk.pepita_max_pool(y, 2, backend=backend)
    torch.testing.assert_close(pooled, F.max_pool2d(y, 2), rtol=0, atol=0, equal_nan=True)


def test_no_samples_and_maps_with_gaps(target: Target) -> None:
    backend, device = target
    empty = torch.empty(0, 3, 4, 4, device=device)
    assert bk.pepita_max_pool(empty, 2, empty, backend=backend).shape == (0, 3, 2, 2)
    y, change = maps(device, 4, 6, 5, 9)
    gaps, change_gaps = y[::2, :, :, 1::2], change[::2, :, :, 1::2]
    got = bk.pepita_max_pool(gaps, 2, change_gaps, stride=1, backend=backend)
    expected = by_places(gaps.cpu(), change_gaps.cpu(), kernel_size=2, stride=1)
    torch.testing.assert_close(got.cpu(), expected)


def test_change_may_lie_otherwise(target: Target) -> None:
    backend, device = target
    y, change = maps(device, 2, 5, 4, 6)
    last = y.contiguous(memory_format=torch.channels_last)
    got = bk.pepita_max_pool(last, 2, change, backend=backend)
    torch.testing.assert_close(got, bk.pepita_max_pool(y, 2, change, backend=backend))


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"y": torch.zeros(2, 3, 4)}, ValueError, "y must have shape \\[batch, channels"),
        ({"y": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "y on cpu must be one of"),
        ({"change": torch.zeros(2, 3, 4, 5)}, ValueError, "change must have shape of y"),
        (
            {"change": torch.zeros(2, 3, 4, 4).double()},
            TypeError,
            "change must have the dtype of y",
        ),
        ({"kernel_size": 0}, ValueError, "kernel_size must be one or two ints of at least 1"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an int or a pair of ints"),
        ({"kernel_size": 5}, ValueError, "input size \\(4, 4\\) is smaller than the window"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be one or two ints"),
        ({"padding": 2}, ValueError, "padding must be at most half of kernel_size"),
        ({"dilation": 4}, ValueError, "smaller than the window"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes(wrong: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = {"y": torch.zeros(2, 3, 4, 4), "kernel_size": 2, **wrong}
    with pytest.raises(error, match=sentence):
        bk.pepita_max_pool(**arguments)
