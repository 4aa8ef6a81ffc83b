"""Invertible convolutions and inverses in NumPy and float64, with no code of the library.

Nothing here convolves or folds: every window is visited by itself, and how many hold a pixel is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .golden import Array, activate

Ints = int | Sequence[int]
Pair = tuple[int, int]


def both(value: Ints) -> Pair:
    """An int or a pair, as a pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclass(frozen=True)
class Windows:
    """How the windows of a convolution lie on a map of a size: arguments as of the ops."""

    size: Pair
    kernel: Pair
    stride: Ints = 1
    padding: Ints | str = 0
    dilation: Ints = 1

    @property
    def reach(self) -> Pair:
        """Rows and columns from a window's first to its last."""
        apart = both(self.dilation)
        return (self.kernel[0] - 1) * apart[0] + 1, (self.kernel[1] - 1) * apart[1] + 1

    @property
    def margins(self) -> tuple[Pair, Pair]:
        """Zeros (above, below) and (left, right). TensorFlow's "same" ends where the last window does."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding != "same":
            return tuple((n, n) for n in both(self.padding))
        margins = []
        for size, reach, step in zip(self.size, self.reach, both(self.stride), strict=True):
            last = 0
            while last + step < size:
                last += step
            missing = max(last + reach - size, 0)
            margins.append((missing // 2, missing - missing // 2))
        return tuple(margins)

    @property
    def positions(self) -> Pair:
        """Rows and columns of the output: every step at which a whole window fits."""
        fits = [
            len(range(0, size + sum(margin) - reach + 1, step))
            for size, margin, reach, step in zip(
                self.size, self.margins, self.reach, both(self.stride), strict=True
            )
        ]
        return fits[0], fits[1]

    def taps(self) -> Iterator[tuple[Pair, Pair, Pair]]:
        """Every window's position, each of its elements, and the pixel that lies there, if one does."""
        steps, apart = both(self.stride), both(self.dilation)
        (above, _), (left, _) = self.margins
        for row, column, i, j in np.ndindex(*self.positions, *self.kernel):
            y, x = row * steps[0] - above + i * apart[0], column * steps[1] - left + j * apart[1]
            if 0 <= y < self.size[0] and 0 <= x < self.size[1]:
                yield (row, column), (i, j), (y, x)

    def times(self) -> Array:
        """n: how many windows hold each pixel."""
        count = np.zeros(self.size)
        for _, _, pixel in self.taps():
            count[pixel] += 1
        return count


def forward(x: Array, weight: Array, bias: Array | None, windows: Windows) -> Array:
    """z = W ∗ x + b."""
    z = np.zeros((len(x), len(weight), *windows.positions))
    for at, tap, pixel in windows.taps():
        z[:, :, *at] += x[:, :, *pixel] @ weight[:, :, *tap].T
    return z if bias is None else z + bias[:, None, None]


def carried_down(signal: Array, kernel: Array, windows: Windows) -> Array:
    """What all windows bring to each pixel: of each output its signal times its kernel."""
    total = np.zeros((len(signal), kernel.shape[1], *windows.size))
    for at, tap, pixel in windows.taps():
        total[:, :, *pixel] += signal[:, :, *at] @ kernel[:, :, *tap]
    return total


def back_through(y: Array, activation: str, slope: float) -> Array:
    """f⁻¹(y)."""
    return np.where(y < 0, y / slope, y) if activation == "leaky_relu" else y


def reconstruct(
    output: Array, x: Array, inverse: Array, bias: Array | None, target: Array | None,
    rate: Array | None, windows: Windows, activation: str, slope: float,
) -> Array:  # fmt: skip
    """x̂, with the nudged output as the paper prints it: u = (1 − γ D²) a + γ D² t."""
    u = output
    if target is not None and rate is not None:
        derivative = activate(output, activation, slope)[1]
        share = rate[:, None, None, None] * derivative**2
        u = (1 - share) * output + share * target
    z = back_through(u, activation, slope)
    if bias is not None:
        z = z - bias[:, None, None]
    return carried_down(z, inverse, windows) - (windows.times() - 1) * x


def inverse_of(weight: Array) -> Array:
    """W⁻ᵀ in the shape of W."""
    return np.linalg.inv(weight.reshape(len(weight), -1)).T.reshape(weight.shape)


def penalty(weight: Array, off_diagonal: bool) -> float:
    """Σ (W Wᵀ − I)², or the sum over the entries off the diagonal."""
    rows = weight.reshape(len(weight), -1)
    gram = np.einsum("ik,jk->ij", rows, rows) - np.eye(len(rows))
    if off_diagonal:
        np.fill_diagonal(gram, 0)
    return float((gram**2).sum())


def penalty_gradient(weight: Array, gram: Array, off_diagonal: bool) -> Array:
    """The gradient of `penalty`, given G = W Wᵀ − I: 4 G W, row by row."""
    rows = weight.reshape(len(weight), -1)
    found = np.zeros_like(rows)
    for i, j in np.ndindex(*gram.shape):
        if not (off_diagonal and i == j):
            found[i] += 4 * gram[i, j] * rows[j]
    return found.reshape(weight.shape)
