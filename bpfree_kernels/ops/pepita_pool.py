"""Max pooling for PEPITA: the pooled map, and how it changes if the map does.

Subtracting two pooled maps would lose the digits that the difference form keeps. With i the place of a
window's maximum in y and i′ that in y + Δy::

    Δpool = (y + Δy)[i′] − y[i] = Δy[i′] + (y[i′] − y[i])

Where the maximum stays, that is Δy itself; where it moves, y[i′] and y[i] lie within Δy of each other, and
their difference is as exact as they are. Of equal values the first counts, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.geometry import POOLING_SCHEMA, MaxPool
from bpfree_kernels.maps import map_order
from bpfree_kernels.ops._define import define
from bpfree_kernels.reference import pepita as reference

Ints = int | Sequence[int]


def _fake(y: Tensor, change: Tensor | None, rows: int, columns: int, *_: int) -> Tensor:
    return y.new_empty(y.shape[0], rows, columns, y.shape[3])


define(
    "pepita_max_pool",
    f"(Tensor y, Tensor? change, int rows, int columns, {POOLING_SCHEMA}) -> Tensor",
    reference=reference.pepita_max_pool,
    fake=_fake,
    triton_module="bpfree_kernels.triton.pepita_pool",
)


@torch.no_grad()
def pepita_max_pool(
    y: Tensor,
    kernel_size: Ints,
    change: Tensor | None = None,
    *,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Max pooling of maps, or with `change` what pooling makes of the difference, without cancellation.

    ``F.max_pool2d(y, ...)``, or ``F.max_pool2d(y + change, ...) - F.max_pool2d(y, ...)``.

    Args:
        y: maps, [batch, channels, height, width]; the batch may be empty.
        kernel_size, padding, dilation, ceil_mode: as `torch.nn.MaxPool2d` has them.
        change: Δy, shaped like `y`, or ``None``.
        stride: the kernel's size by default.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Returns:
        [batch, channels, rows, columns], with the channels last in memory if they lie so in `y`.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, a map smaller than the window, or a padding of more
            than half of it.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("y", y)
    checks.dims("y", y, 4, "[batch, channels, height, width]")
    if change is not None:
        checks.like("change", change, "y", y)
    pool = MaxPool(kernel_size, stride, padding, dilation, ceil_mode)
    size = pool.size((y.shape[2], y.shape[3]))
    body = backends.body("pepita_max_pool", y.device.type, backend)
    last = map_order(y) is torch.channels_last
    entered = (None if maps is None else _planes(maps, last) for maps in (y, change))
    pooled = cast(Tensor, body(*entered, *size, *pool.windows()))
    if last:
        return pooled.permute(0, 3, 1, 2)
    return pooled.view(*y.shape[:2], *size)


def _planes(maps: Tensor, channels_last: bool) -> Tensor:
    """Maps as the bodies take them, [outer, height, width, inner]: one of the two is the channels."""
    if channels_last:
        return maps.permute(0, 2, 3, 1).contiguous()
    return maps.contiguous().view(maps.shape[0] * maps.shape[1], *maps.shape[2:], 1)
