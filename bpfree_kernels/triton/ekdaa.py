"""EKDAA in Triton (equations: `bpfree_kernels.ops.ekdaa`).

An error comes down through E as a product for each pixel of the convolution's input, summed over taps and
output channels: the windows that hold the pixel are gathered, not scattered to, without atomics. Where
windows of the pooling do not overlap, a pixel of the pooled map answers for all units of its window, and
the program that has its d writes their errors: no map in between. Where they overlap, d is stored, and
each unit adds up what its windows have for it. Maps are read as they lie, channels first or last. A dense
layer is a convolution of maps of one pixel.

In the tiles N counts samples and pixels, H inputs of one group, K outputs of a tap (summed over).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.geometry import Geometry, Pooling
from bpfree_kernels.maps import like_maps, map_order
from bpfree_kernels.triton.activations import difference
from bpfree_kernels.triton.launch import Blocks, index_type, launch, on_matrix_units, products
from bpfree_kernels.triton.windows import Layer, block, fit, lies_last, load_pixels, position_above

BLOCK = 512
"""Units of a program without a product."""


@triton.jit
def _unit(element, top, left, height, width, POOL: tl.constexpr):
    """The pixel of a window's element, and whether it lies on the map."""
    h = top + element // POOL.kernel_w * POOL.dilation_h
    w = left + element % POOL.kernel_w * POOL.dilation_w
    return h.to(tl.int64) * width + w, (h >= 0) & (h < height) & (w >= 0) & (w < width)


@triton.jit
def _winner(
    z_ptr, starts, channels, step, top, left, inside, height, width, POOL: tl.constexpr
):  # fmt: skip
    """Which element of each window has the largest z: the first of equals, NaN before any number.

    It lies on the map, even where all are −∞. Pixel p of a map lies at `starts` + p · `step` + `channels`.
    """
    most = tl.full(inside.shape, float("-inf"), tl.float32)
    winner = tl.full(inside.shape, -1, tl.int32)
    for element in range(POOL.kernel_h * POOL.kernel_w):
        pixel, on_map = _unit(element, top, left, height, width, POOL)
        mask = inside & on_map
        at = (starts + pixel * step) + channels
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        wins = mask & ((winner < 0) | (z > most) | ((z != z) & (most == most)))
        most = tl.where(wins, z, most)
        winner = tl.where(wins, element, winner)
    return winner


@triton.jit(do_not_specialize=["count", "height", "width", "inner", "rows", "columns"])
def error_kernel(
    change_ptr, z_ptr, e_ptr, beta, slope, count, height, width, inner, rows, columns,
    POOL: tl.constexpr, UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """e of BLOCK units of maps [outer, height, width, inner], from d of any windows."""
    places = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    channel = places % inner
    h = places // inner // width % height
    w = places // inner % width
    outer = (places // inner // width // height).to(tl.int64)
    starts = outer * height * width * inner
    z = tl.load(z_ptr + places, mask=inside, other=0.0).to(tl.float32)
    # As many windows as can hold a unit: from the last that starts before it.
    down: tl.constexpr = (POOL.dilation_h * (POOL.kernel_h - 1)) // POOL.stride_h + 1
    across: tl.constexpr = (POOL.dilation_w * (POOL.kernel_w - 1)) // POOL.stride_w + 1
    total = tl.zeros([BLOCK], tl.float32)
    for window in range(down * across):
        row = (h + POOL.pad_top) // POOL.stride_h - window // across
        column = (w + POOL.pad_left) // POOL.stride_w - window % across
        top = row * POOL.stride_h - POOL.pad_top
        left = column * POOL.stride_w - POOL.pad_left
        i = (h - top) // POOL.dilation_h
        j = (w - left) // POOL.dilation_w
        holds = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        holds &= (i < POOL.kernel_h) & ((h - top) % POOL.dilation_h == 0)
        holds &= (j < POOL.kernel_w) & ((w - left) % POOL.dilation_w == 0)
        pooled = ((outer * rows + row) * columns + column) * inner + channel
        d = tl.load(change_ptr + pooled, mask=holds, other=0.0).to(tl.float32)
        if UPSAMPLE == "argmax":
            winner = _winner(
                z_ptr, starts, channel, inner, top, left, holds, height, width, POOL
            )  # fmt: skip
            d = tl.where(winner == i * POOL.kernel_w + j, d, 0.0)
        total += d
    if UPSAMPLE == "average":
        total /= POOL.kernel_h * POOL.kernel_w
    tl.store(e_ptr + places, -difference(z, -beta * total, slope, ACTIVATION), mask=inside)


@triton.jit
def _carry_down(
    error_ptr, feedback_ptr, samples, row, column, has_pixel, group, members,
    error_rows, error_columns, taps,
    LAYER: tl.constexpr, LAST: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d = E ∗ᵀ e at some pixels and inputs of a group, float32 [pixels, inputs].

    E lies there as [tap, out, in/groups].
    """
    outputs: tl.constexpr = LAYER.groups * LAYER.units
    blocks_of_tap: tl.constexpr = (LAYER.units + BLOCK_K - 1) // BLOCK_K
    size = error_rows.to(tl.int64) * error_columns
    has_input = (members < LAYER.channels)[None, :]
    change = tl.zeros([row.shape[0], members.shape[0]], tl.float32)
    for step in range(taps * blocks_of_tap):  # one loop, so that it fetches ahead across taps
        tap = step // blocks_of_tap
        position, fits = position_above(row, column, tap, error_rows, error_columns, LAYER)
        of_group = step % blocks_of_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        has_unit = of_group < LAYER.units
        units = group * LAYER.units + of_group
        error = load_pixels(
            error_ptr, samples, position, units, has_pixel & fits, has_unit, size, outputs, LAST
        )  # fmt: skip
        at = (tap.to(tl.int64) * outputs + units)[:, None] * LAYER.channels + members[None, :]
        feedback = tl.load(feedback_ptr + at, mask=has_unit[:, None] & has_input, other=0.0)
        change = tl.dot(
            error.to(OPERAND), feedback.to(OPERAND), change, input_precision=PRECISION
        )  # fmt: skip
    return change


@triton.jit
def _write_windows(
    change, z_ptr, e_ptr, starts, channels, step, top, left, inside, height, width, beta, slope,
    POOL: tl.constexpr, UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """e of every unit of the windows that these changes belong to, places as in `_winner`."""
    shift = -beta * change
    if UPSAMPLE == "average":
        shift /= POOL.kernel_h * POOL.kernel_w
    if UPSAMPLE == "argmax":
        winner = _winner(
            z_ptr, starts, channels, step, top, left, inside, height, width, POOL
        )  # fmt: skip
    for element in range(POOL.kernel_h * POOL.kernel_w):
        pixel, on_map = _unit(element, top, left, height, width, POOL)
        mask = inside & on_map
        at = (starts + pixel * step) + channels
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        of_unit = shift
        if UPSAMPLE == "argmax":
            of_unit = tl.where(winner == element, shift, 0.0)
        e = -difference(z, of_unit, slope, ACTIVATION)
        tl.store(e_ptr + at, e, mask=mask)


@triton.jit(
    do_not_specialize=[
        "places", "rows", "columns", "height", "width", "error_rows", "error_columns", "taps",
    ]
)  # fmt: skip
def conv_error_kernel(
    error_ptr, feedback_ptr, z_ptr, e_ptr, beta, slope,
    places, rows, columns, height, width, error_rows, error_columns, taps,
    LAYER: tl.constexpr, POOL: tl.constexpr, UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    ERROR_LAST: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """e of the units that some pixels and inputs of the convolution were pooled from.

    Without `z_ptr` d itself, of maps that were not pooled.
    """
    inputs: tl.constexpr = LAYER.groups * LAYER.channels
    members, index = block(tl.program_id(0), LAYER.channels, BLOCK_H)
    group = index % LAYER.groups
    place = (index // LAYER.groups).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_pixel = place < places
    samples = (place // columns // rows).to(tl.int64)
    row = place // columns % rows
    column = place % columns
    change = _carry_down(
        error_ptr, feedback_ptr, samples, row, column, has_pixel, group, members,
        error_rows, error_columns, taps, LAYER, ERROR_LAST, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    has_input = members < LAYER.channels
    channels = group * LAYER.channels + members
    top = row * POOL.stride_h - POOL.pad_top
    left = column * POOL.stride_w - POOL.pad_left
    size = height.to(tl.int64) * width
    starts = samples * size * inputs
    if LAST:
        starts, channels = starts[:, None], channels[None, :]
        top, left = top[:, None], left[:, None]
        inside = has_pixel[:, None] & has_input[None, :]
        step = tl.full([], inputs, tl.int64)
    else:  # lanes follow the last axis of a tile: let that be the one that lies together
        change = tl.trans(change)
        starts, channels = starts[None, :], channels.to(tl.int64)[:, None] * size
        top, left = top[None, :], left[None, :]
        inside = has_input[:, None] & has_pixel[None, :]
        step = tl.full([], 1, tl.int64)
    if z_ptr is None:
        pixel, _ = _unit(0, top, left, height, width, POOL)
        tl.store(e_ptr + (starts + pixel * step + channels), change, mask=inside)
    else:
        _write_windows(
            change, z_ptr, e_ptr, starts, channels, step, top, left, inside, height, width,
            beta, slope, POOL, UPSAMPLE, ACTIVATION,
        )  # fmt: skip


_ONE_BY_ONE = Pooling(1, 1, 1, 1, 0, 0, 1, 1)


def _overlap(pool: Pooling) -> bool:
    """Whether a unit may lie in two windows."""
    apart = (pool.dilation_h, pool.dilation_w)
    triples = zip(pool.kernel, pool.stride, apart, strict=True)
    return any(step <= dilation * (size - 1) for size, step, dilation in triples)


def _way_up(upsample: str, pool: Pooling) -> str:
    """An up-sampling as the kernels are compiled for it: one unit has no winner to look for."""
    return "nearest" if pool.kernel == (1, 1) else upsample


def _covers(pool: Pooling, pooled: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether every unit of a map lies in a window of windows that do not overlap."""
    close = pool.kernel == pool.stride and pool.dilation_h == pool.dilation_w == 1
    pads = (pool.pad_top, pool.pad_left)
    places = zip(pooled, pool.stride, pads, size, strict=True)
    return close and all(count * step - pad >= most for count, step, pad, most in places)


def _product(
    error: Tensor,
    feedback: Tensor,
    out: Tensor,
    z: Tensor | None,
    place: Geometry,
    pooled: tuple[int, int],
    pool: Pooling,
    beta: float,
    upsample: str,
    activation: str,
    slope: float,
) -> None:
    """Write e to `out` or, without `z`, d; one launch. `pooled` is the size of the convolution's input."""
    outputs, channels, kernel_h, kernel_w = feedback.shape
    layer = Layer(kernel_w, max(1, channels), outputs // place.groups, *place)
    # Weights that are multiplied together lie together; a copy, but of a weight.
    taps_first = feedback.permute(2, 3, 0, 1).contiguous()
    places = out.shape[0] * pooled[0] * pooled[1]
    # A program keeps every unit of its windows in registers: with fewer channels, they are enough.
    wide, deep = 32 if pool.kernel != (1, 1) else 64, 32 if on_matrix_units(error) else 16
    blocks = Blocks(fit(places), fit(channels, wide), fit(layer.units, deep), 8, 3)
    tiles = triton.cdiv(channels, blocks.BLOCK_H) * layer.groups
    launch(
        conv_error_kernel, (triton.cdiv(places, blocks.BLOCK_N) * tiles,),
        error, taps_first, z, out, beta, slope,
        places, *pooled, *out.shape[2:], *error.shape[2:], kernel_h * kernel_w, on=error,
        LAYER=layer, POOL=pool, UPSAMPLE=_way_up(upsample, pool),
        ACTIVATION=activation, ERROR_LAST=lies_last(error), LAST=lies_last(out),
        INDEX=index_type(places), **products(error, blocks),
    )  # fmt: skip


def ekdaa_error(
    change: Tensor, z: Tensor, beta: float, upsample: str, *rest: Any
) -> Tensor:  # fmt: skip
    """f(z) − f(z − β up(d)); `rest` is the pooling, the activation and its slope."""
    *pooling, activation, slope = rest
    pool, e = Pooling(*pooling), torch.empty_like(z)
    channels, height, width = z.shape[1:]
    inner = channels if map_order(z) is torch.channels_last else 1
    launch(
        error_kernel, (triton.cdiv(z.numel(), BLOCK),), like_maps(change, z), z, e, beta, slope,
        z.numel(), height, width, inner, *change.shape[2:], on=z,
        POOL=pool, UPSAMPLE=_way_up(upsample, pool),
        ACTIVATION=activation, INDEX=index_type(z.numel()), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return e


def ekdaa_linear_error(
    error: Tensor, feedback: Tensor, z: Tensor, beta: float, activation: str, slope: float
) -> Tensor:
    """f(z) − f(z − β e E)."""
    e = torch.empty_like(z)
    maps = (tensor[:, :, None, None] for tensor in (error, feedback, e, z))
    place = Geometry(1, 1, 0, 0, 1, 1, 1)
    _product(*maps, place, (1, 1), _ONE_BY_ONE, beta, "nearest", activation, slope)
    return e


def ekdaa_conv_error(
    error: Tensor, feedback: Tensor, z: Tensor, beta: float, *rest: Any
) -> Tensor:  # fmt: skip
    """f(z) − f(z − β up(E ∗ᵀ e)); `rest` is the geometry, and what `ekdaa_error` takes."""
    place, pooled, upsample = Geometry(*rest[:7]), (rest[7], rest[8]), rest[9]
    *pooling, activation, slope = rest[10:]
    pool, of_below = Pooling(*pooling), (upsample, activation, slope)
    if _overlap(pool):
        change = torch.empty(
            (*z.shape[:2], *pooled),
            dtype=torch.float32,
            device=z.device,
            memory_format=map_order(z),
        )
        _product(
            error, feedback, change, None, place, pooled, _ONE_BY_ONE, beta, *of_below
        )  # fmt: skip
        return ekdaa_error(change, z, beta, *rest[9:])
    covered = _covers(pool, pooled, (z.shape[2], z.shape[3]))
    e = torch.empty_like(z) if covered else torch.zeros_like(z)
    _product(error, feedback, e, z, place, pooled, pool, beta, *of_below)
    return e
