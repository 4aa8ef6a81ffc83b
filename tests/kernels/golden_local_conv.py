"""A locally connected layer as what it is: one matrix from the map to the output map, mostly zeros.

In NumPy and float64, with no code of the library and nothing that unfolds or convolves: the matrix is
filled one connection at a time, multiplied as a whole, and its gradient is read off where connections are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .golden import Array

Ints = int | Sequence[int]


class Connection(NamedTuple):
    """A weight's place in the kernels, [row, column, kernel row, kernel column], and the pixel it reads."""

    weight: tuple[int, int, int, int]
    pixel: tuple[int, int]


def _both(value: Ints) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _connections(
    shape: tuple[int, ...], size: tuple[int, int], stride: Ints, padding: Ints | str, dilation: Ints
) -> Iterator[Connection]:
    """Every connection to a pixel that is inside the map; those to the border lead nowhere."""
    steps, apart, kernel = _both(stride), _both(dilation), shape[2:4]
    if padding == "same":  # the smaller half before the map, the larger half behind it
        before = tuple((k - 1) * d // 2 for k, d in zip(kernel, apart, strict=True))
    else:
        before = (0, 0) if padding == "valid" else _both(padding)
    for row, column, i, j in np.ndindex(*shape[:4]):
        pixel = (
            row * steps[0] - before[0] + i * apart[0],
            column * steps[1] - before[1] + j * apart[1],
        )
        if 0 <= pixel[0] < size[0] and 0 <= pixel[1] < size[1]:
            yield Connection((row, column, i, j), pixel)


def _blocks(shape: tuple[int, ...], groups: int) -> Iterator[tuple[slice, slice]]:
    """The channels of the input and of the output that belong together."""
    inputs, outputs = shape[4], shape[5] // groups
    for group in range(groups):
        yield (
            slice(group * inputs, (group + 1) * inputs),
            slice(group * outputs, (group + 1) * outputs),
        )


def matrix(
    weight: Array, size: tuple[int, int], stride: Ints, padding: Ints | str, dilation: Ints,
    groups: int,
) -> Array:  # fmt: skip
    """The layer as one matrix, [rows, columns, out, in, height, width]."""
    rows, columns, _, _, inputs, outputs = weight.shape
    whole = np.zeros((rows, columns, outputs, inputs * groups, *size))
    for at, (y, x) in _connections(weight.shape, size, stride, padding, dilation):
        for read, written in _blocks(weight.shape, groups):
            whole[at[0], at[1], written, read, y, x] += weight[at][:, written].T
    return whole


def forward(
    x: Array, weight: Array, bias: Array | None, stride: Ints, padding: Ints | str, dilation: Ints,
    groups: int,
) -> Array:  # fmt: skip
    """z, [batch, out, rows, columns]."""
    whole = matrix(weight, x.shape[2:], stride, padding, dilation, groups)
    z = np.einsum("nchw,rqochw->norq", x, whole, optimize=True)
    return z if bias is None else z + np.moveaxis(bias, 2, 0)


def feedback(
    signal: Array, weight: Array, size: tuple[int, int], stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int,
) -> Array:  # fmt: skip
    """The signal at the input, through the transposed matrix, [batch, in, height, width]."""
    whole = matrix(weight, size, stride, padding, dilation, groups)
    return np.einsum("norq,rqochw->nchw", signal, whole, optimize=True)


def gradients(
    signal: Array, x: Array, weight: Array, bias: Array | None, scale: float, stride: Ints,
    padding: Ints | str, dilation: Ints, groups: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Gradients of the weight and the bias: the dense matrix's, where a connection is."""
    whole = np.einsum("norq,nchw->rqochw", signal, x, optimize=True)
    grad = np.zeros(weight.shape)
    for at, (y, x_) in _connections(weight.shape, x.shape[2:], stride, padding, dilation):
        for read, written in _blocks(weight.shape, groups):
            grad[at][:, written] = whole[at[0], at[1], written, read, y, x_].T
    return scale * grad, scale * np.moveaxis(signal.sum(0), 0, 2)
