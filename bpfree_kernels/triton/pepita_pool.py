"""Max pooling of maps and of their changes in Triton (equations: `bpfree_kernels.ops.pepita_pool`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.launch import launch

BLOCK = 512
"""Pooled values of a program."""


@triton.jit
def _takes(of, most):
    """Where a value is larger than the maximum so far, or NaN, which a maximum keeps."""
    return (of > most) | (of != of)


@triton.jit(do_not_specialize=["count", "height", "width", "inner", "rows", "columns"])
def max_pool_kernel(
    y_ptr, change_ptr, pooled_ptr, count, height, width, inner, rows, columns,
    CHANGES: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pool BLOCK values of maps [outer, height, width, inner], or with CHANGES their change."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    channels = places % inner
    pixels = places // inner
    left = pixels % columns * STRIDE_W - PAD_LEFT
    top = pixels // columns % rows * STRIDE_H - PAD_TOP
    maps = pixels // columns // rows * height * width
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    most_after, value, step = most, most, tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            h, w = top + i * DILATION_H, left + j * DILATION_W
            valid = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            at = (maps + h * width + w) * inner + channels
            here = tl.load(y_ptr + at, mask=valid, other=float("-inf")).to(tl.float32)
            most = tl.where(_takes(here, most), here, most)
            if CHANGES:
                by = tl.load(change_ptr + at, mask=valid, other=0.0).to(tl.float32)
                after = here + by
                now = _takes(after, most_after)
                most_after = tl.where(now, after, most_after)
                value = tl.where(now, here, value)
                step = tl.where(now, by, step)
    pooled = step + (value - most) if CHANGES else most
    tl.store(pooled_ptr + places, pooled, mask=inside)


def pepita_max_pool(
    y: Tensor,
    change: Tensor | None,
    rows: int,
    columns: int,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_top: int,
    pad_left: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    """The pooled maps of y [outer, height, width, inner], or with Δy their change."""
    outer, height, width, inner = y.shape
    pooled = y.new_empty(outer, rows, columns, inner)
    launch(
        max_pool_kernel, (triton.cdiv(pooled.numel(), BLOCK),), y, change, pooled, on=y,
        count=pooled.numel(), height=height, width=width, inner=inner, rows=rows, columns=columns,
        CHANGES=change is not None, KERNEL_H=kernel_h, KERNEL_W=kernel_w,
        STRIDE_H=stride_h, STRIDE_W=stride_w, PAD_TOP=pad_top, PAD_LEFT=pad_left,
        DILATION_H=dilation_h, DILATION_W=dilation_w, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return pooled
