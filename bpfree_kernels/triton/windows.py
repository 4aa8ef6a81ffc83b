"""Windows and maps as kernels see them: what the kernels of `conv`, `local_conv` and `ekdaa` share.

A tap is a place in a convolution's kernel; the elements of a window are its taps times the channels of a
group. Offsets in maps are int64: they may hold more than 2³¹ elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.maps import map_order


class Layer(NamedTuple):
    """What a kernel is compiled for: the sizes of a window's row, and where windows lie (`Geometry`).

    As constants they turn the divisions that find a tap into multiplications, and show the compiler
    which runs of channels are aligned. The kernel's height is no constant: with a known number of
    steps, ptxas unrolls the whole sum over a window, and spills.
    """

    kernel_w: int
    channels: int
    """Inputs of one group; 1 if there are none, for the divisions."""
    units: int
    """Outputs of one group."""
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int
    groups: int


@triton.jit
def block(index, size, BLOCK: tl.constexpr):
    """Split a program's index: the numbers in its block of `size`, and the index that is left."""
    blocks = tl.cdiv(size, BLOCK)
    return index % blocks * BLOCK + tl.arange(0, BLOCK), index // blocks


@triton.jit
def position_above(row, column, tap, rows, columns, LAYER: tl.constexpr):
    """The output position whose window holds a pixel of the input at a tap, and whether there is one."""
    down = row + LAYER.pad_top - tap // LAYER.kernel_w * LAYER.dilation_h
    across = column + LAYER.pad_left - tap % LAYER.kernel_w * LAYER.dilation_w
    row_above = down // LAYER.stride_h
    column_above = across // LAYER.stride_w
    fits = (down >= 0) & (down % LAYER.stride_h == 0) & (row_above < rows)
    fits &= (across >= 0) & (across % LAYER.stride_w == 0) & (column_above < columns)
    return row_above.to(tl.int64) * columns + column_above, fits


@triton.jit
def load_pixels(
    maps_ptr, samples, pixels, channels, has_pixel, has_channel, size,
    CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Some channels of some pixels, [pixels, channels]; 0 where there is none.

    A map has `size` pixels. Read in the direction in which it lies in memory.
    """
    samples = samples.to(tl.int64)
    if LAST:
        at = ((samples * size + pixels) * CHANNELS)[:, None] + channels[None, :]
        return tl.load(maps_ptr + at, mask=has_pixel[:, None] & has_channel[None, :], other=0.0)
    at = channels.to(tl.int64)[:, None] * size + (samples * size * CHANNELS + pixels)[None, :]
    lying = tl.load(maps_ptr + at, mask=has_channel[:, None] & has_pixel[None, :], other=0.0)
    return tl.trans(lying)


def lies_last(maps: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side."""
    return map_order(maps) is torch.channels_last or maps.shape[2] * maps.shape[3] == 1


def fit(size: int, most: int = 64) -> int:
    """The tile side for a size: a power of two, at least 16 for a product."""
    return min(most, max(16, triton.next_power_of_2(size)))
