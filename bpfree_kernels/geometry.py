"""Where the windows of a convolution lie: stride, padding and dilation, checked and worked out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How windows lie on a map, as the bodies get it, in schema order.

    The size of the output says how far the windows reach below and to the right; what lies outside the
    map counts as zero.
    """

    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int
    groups: int


GEOMETRY_SCHEMA = ", ".join(f"int {field}" for field in Geometry._fields)
"""`Geometry` in the schema of an op."""


class Pooling(NamedTuple):
    """How the windows of a max pooling lie on a map, as the bodies get it, in schema order."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int

    @property
    def kernel(self) -> Pair:
        """Height and width of a window."""
        return self.kernel_h, self.kernel_w

    @property
    def stride(self) -> Pair:
        """Step between windows, (down, across)."""
        return self.stride_h, self.stride_w


POOLING_SCHEMA = ", ".join(f"int pool_{field}" for field in Pooling._fields)
"""`Pooling` in the schema of an op, by other names than a `Geometry` beside it."""


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """An int or a pair of ints (height, width) as a pair, none below `least`.

    Raises:
        TypeError: something else.
        ValueError: a value below `least`, or not two values.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}.")
    if len(values) != 2 or min(values) < least:
        raise ValueError(f"{name} must be one or two ints of at least {least}, got {value!r}.")
    return values[0], values[1]


def split_padding(
    padding: int | Sequence[int] | str, kernel: Pair, dilation: Pair, stride: Pair
) -> tuple[Pair, Pair]:
    """Padding as ((top, bottom), (left, right)).

    ``"valid"`` is none. ``"same"`` keeps the size of the map, and like `torch.nn.Conv2d` takes no stride;
    where the sum is odd, one more lies below and on the right.

    Raises:
        TypeError, ValueError: as `pair`; ValueError also for another word, or "same" with a stride.
    """
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid', or ints, got {padding!r}.")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding 'same' needs stride 1, got stride {stride}.")
        same = padding == "same"
        totals = [d * (k - 1) if same else 0 for k, d in zip(kernel, dilation, strict=True)]
        above, left = (total // 2 for total in totals)
        return (above, totals[0] - above), (left, totals[1] - left)
    height, width = pair("padding", padding, 0)
    return (height, height), (width, width)


def same_margins(
    input_size: Pair,
    kernel: Pair,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Pair, Pair]:
    """Padding ((top, bottom), (left, right)) of TensorFlow's ``"same"``: ⌈size / stride⌉ positions.

    Raises:
        TypeError, ValueError: as `pair`.
    """
    steps, apart = pair("stride", stride, 1), pair("dilation", dilation, 1)
    totals = [
        max(((size - 1) // s) * s + d * (k - 1) + 1 - size, 0)
        for size, k, s, d in zip(input_size, kernel, steps, apart, strict=True)
    ]
    above, left = (total // 2 for total in totals)
    return (above, totals[0] - above), (left, totals[1] - left)


def output_size(
    input_size: Sequence[int],
    kernel: Pair,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Pair:
    """Height and width of a convolution's output.

    Args:
        input_size: height and width of the map.
        kernel: height and width of the window.
        stride: step between windows.
        padding: zeros around the map on each side, ``"same"`` or ``"valid"``.
        dilation: distance of a window's elements.

    Raises:
        TypeError, ValueError: as `split_padding`; ValueError also for a map smaller than the window,
            or a window of no size.
    """
    steps, apart = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if min(kernel) < 1:
        raise ValueError(f"kernel must be at least 1 x 1, got {kernel[0]} x {kernel[1]}.")
    pads = split_padding(padding, kernel, apart, steps)
    sizes = [
        (size + sum(pad) - d * (k - 1) - 1) // s + 1
        for size, pad, k, d, s in zip(input_size, pads, kernel, apart, steps, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"input size {tuple(input_size)} is smaller than the window: kernel {kernel}, "
            f"dilation {apart}, padding {padding!r}."
        )
    return sizes[0], sizes[1]


def geometry(
    kernel: Pair,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry that the bodies get.

    Raises:
        TypeError, ValueError: as `split_padding`, and for groups that are no int, or below 1.
    """
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r}.")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}.")
    steps, apart = pair("stride", stride, 1), pair("dilation", dilation, 1)
    (top, _), (left, _) = split_padding(padding, kernel, apart, steps)
    return Geometry(*steps, top, left, *apart, groups)


@dataclass(frozen=True)
class MaxPool:
    """A max pooling, with the arguments of `torch.nn.MaxPool2d`.

    Args:
        kernel_size: height and width of a window, or one int for both.
        stride: step between windows; the kernel's size by default.
        padding: rows and columns around the map, at most half of the kernel.
        dilation: distance of a window's elements.
        ceil_mode: whether a window may reach over the lower or right edge, if it starts on the map or in
            the padding before it.

    Raises:
        TypeError: something else than ints.
        ValueError: values out of range.
    """

    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        pads, kernel = pair("padding", self.padding, 0), pair("kernel_size", self.kernel_size, 1)
        if any(2 * pad > size for pad, size in zip(pads, kernel, strict=True)):
            raise ValueError(f"padding must be at most half of kernel_size {kernel}, got {pads}.")
        self.windows()

    def windows(self) -> Pooling:
        """How the windows lie."""
        kernel = pair("kernel_size", self.kernel_size, 1)
        steps = kernel if self.stride is None else pair("stride", self.stride, 1)
        pads, apart = pair("padding", self.padding, 0), pair("dilation", self.dilation, 1)
        return Pooling(*kernel, *steps, *pads, *apart)

    def size(self, input_size: Pair) -> Pair:
        """Height and width of the pooled map of a map, as torch counts them.

        Raises:
            ValueError: a map smaller than the window.
        """
        sizes = []
        windows = self.windows()
        pads, apart = windows[4:6], windows[6:8]
        places = zip(input_size, windows.kernel, windows.stride, pads, apart, strict=True)
        for size, k, s, pad, d in places:
            room = size + 2 * pad - d * (k - 1) - 1
            count = (-(-room // s) if self.ceil_mode else room // s) + 1
            if self.ceil_mode and (count - 1) * s >= size + pad:
                count -= 1
            sizes.append(count)
        if min(sizes) < 1:
            raise ValueError(
                f"input size {input_size} is smaller than the window: kernel {windows.kernel}, "
                f"dilation {apart}, padding {pads}."
            )
        return sizes[0], sizes[1]
