"""A convolution's products and EKDAA's error, in NumPy and float64, with no code of the library.

Nothing here convolves or unfolds: every window of a convolution is visited by itself, and every window of
a pooling, too. Arguments are those of `torch.nn.Conv2d` and `torch.nn.MaxPool2d`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .golden import Array
from .golden_pepita import Gradients, difference

Ints = int | Sequence[int]
Pair = tuple[int, int]


def _both(value: Ints) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _taps(
    rows: int, columns: int, kernel: Pair, size: Pair, stride: Ints, padding: Ints | str,
    dilation: Ints,
) -> Iterator[tuple[Pair, Pair, Pair]]:  # fmt: skip
    """Every window's position, each of its elements, and the pixel that lies there, if one does."""
    steps, apart = _both(stride), _both(dilation)
    if padding == "same":  # the smaller half before the map, the larger half behind it
        before = (kernel[0] - 1) * apart[0] // 2, (kernel[1] - 1) * apart[1] // 2
    else:
        before = (0, 0) if padding == "valid" else _both(padding)
    for row, column, i, j in np.ndindex(rows, columns, *kernel):
        y = row * steps[0] - before[0] + i * apart[0]
        x = column * steps[1] - before[1] + j * apart[1]
        if 0 <= y < size[0] and 0 <= x < size[1]:
            yield (row, column), (i, j), (y, x)


def _groups(inputs: int, outputs: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """The channels of the input and of the output that belong together."""
    read, written = inputs // groups, outputs // groups
    for group in range(groups):
        yield (
            slice(group * read, (group + 1) * read),
            slice(group * written, (group + 1) * written),
        )


def gradients(
    signal: Array, x: Array, weight: Array, bias: Array | None, scale: float, stride: Ints,
    padding: Ints | str, dilation: Ints, groups: int,
) -> Gradients:  # fmt: skip
    """Gradients of a convolution's weight and bias from the signal at its output units (E3)."""
    grad = np.zeros(weight.shape)
    place = (stride, padding, dilation)
    for at, tap, pixel in _taps(*signal.shape[2:], weight.shape[2:], x.shape[2:], *place):
        for read, written in _groups(x.shape[1], signal.shape[1], groups):
            post, pre = signal[:, written, *at], x[:, read, *pixel]
            grad[written, :, *tap] += np.einsum("no,ni->oi", post, pre)
    return Gradients(scale * grad, scale * signal.sum((0, 2, 3)))


def carried_down(
    error: Array, kernel: Array, size: Pair, stride: Ints, padding: Ints | str, dilation: Ints,
    groups: int,
) -> Array:  # fmt: skip
    """d = E ∗ᵀ e, at a convolution's input of this size: E lies as W does, and is not flipped."""
    inputs = kernel.shape[1] * groups
    d = np.zeros((error.shape[0], inputs, *size))
    place = (stride, padding, dilation)
    for at, tap, pixel in _taps(*error.shape[2:], kernel.shape[2:], size, *place):
        for read, written in _groups(inputs, error.shape[1], groups):
            d[:, read, *pixel] += np.einsum(
                "no,oi->ni", error[:, written, *at], kernel[written, :, *tap]
            )
    return d


def _bilinear(change: Array, size: Pair) -> Array:
    """Interpolated between the pooled units' centres; beyond the outermost ones, their values."""
    for axis, wide in ((2, size[0]), (3, size[1])):
        narrow = change.shape[axis]
        parts = []
        for place in range(wide):
            centre = max((place + 0.5) * narrow / wide - 0.5, 0.0)
            low = int(centre)
            high, share = min(low + 1, narrow - 1), centre - low
            parts.append((1 - share) * change.take(low, axis) + share * change.take(high, axis))
        change = np.stack(parts, axis)
    return change


def _winner(window: Array) -> int:
    """The first of the largest values; not a number counts as the largest."""
    best = 0
    for place in range(1, len(window)):
        if window[place] > window[best] or (np.isnan(window[place]) and not np.isnan(window[best])):
            best = place
    return best


def upsampled(change: Array, z: Array, upsample: str, pool: Mapping[str, Any] | None) -> Array:
    """Pooled maps at the size of z (E2); `pool` is the arguments of the max pooling."""
    if pool is None:
        return change
    if upsample == "bilinear":
        return _bilinear(change, z.shape[2:])
    kernel = _both(pool["kernel_size"])
    place = (pool.get("stride", kernel), pool.get("padding", 0), pool.get("dilation", 1))
    windows: dict[Pair, list[Pair]] = {}
    for at, _, pixel in _taps(*change.shape[2:], kernel, z.shape[2:], *place):
        windows.setdefault(at, []).append(pixel)
    area = kernel[0] * kernel[1]
    up = np.zeros(z.shape)
    for at, pixels in windows.items():
        for unit in np.ndindex(*z.shape[:2]):
            value = change[*unit, *at]
            if upsample == "argmax":
                best = _winner(np.array([z[*unit, *pixel] for pixel in pixels]))
                up[*unit, *pixels[best]] += value
                continue
            for pixel in pixels:
                up[*unit, *pixel] += value / (area if upsample == "average" else 1)
    return up


def aligned(z: Array, change: Array, beta: float, activation: str, slope: float) -> Array:
    """e = f(z) − f(z − β d), right in every digit."""
    return -difference(z, -beta * change, activation, slope)
