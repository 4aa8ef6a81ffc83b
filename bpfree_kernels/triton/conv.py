"""What a convolution learns, in Triton (equations: `bpfree_kernels.ops.conv`).

A weight is small against the maps that it learns from: the sum over samples and positions is shared out,
so that the whole device has work. Every program adds up its part for a tile of the gradient, in float32;
a second kernel adds the parts, always in the same order, and applies or stores the sum. Maps are read as
they lie, channels first or last.

In the tiles N counts samples and positions (summed over), H outputs of one group, K elements of a window
(tap, input channel).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.geometry import Geometry
from bpfree_kernels.triton.launch import Blocks, index_type, launch, on_matrix_units, products
from bpfree_kernels.triton.optimizers import (
    Learning,
    Target,
    keep_gradients,
    learn_in_place,
    make_target,
    prepare,
    write,
)
from bpfree_kernels.triton.windows import Layer, block, fit, lies_last, load_pixels

BLOCK = 128
"""Elements of the gradient of a program that adds parts."""

_PROGRAMS = 512
"""How many programs share the sums, if there are enough samples and positions."""


@triton.jit
def _gather(
    x_ptr, starts, y, x, has_position, steps, i, j, has_element, height, width
):  # fmt: skip
    """Elements of windows, any order of axes; 0 outside the map."""
    y = y + i
    x = x + j
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(x_ptr + (starts + steps), mask=inside & has_position & has_element, other=0.0)


@triton.jit
def _windows(
    x_ptr, samples, positions, has_position, elements, has_element, group, columns, height, width,
    LAYER: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Elements (tap, channel) of the windows of some positions, [positions, elements].

    Where an element lies is where its window starts and a step that all windows share.
    """
    inputs: tl.constexpr = LAYER.groups * LAYER.channels
    size = height.to(tl.int64) * width
    y = positions // columns * LAYER.stride_h - LAYER.pad_top
    x = positions % columns * LAYER.stride_w - LAYER.pad_left
    taps = elements // LAYER.channels
    channels = group * LAYER.channels + elements % LAYER.channels
    i = taps // LAYER.kernel_w * LAYER.dilation_h
    j = taps % LAYER.kernel_w * LAYER.dilation_w
    starts = y.to(tl.int64) * width + x
    steps = i.to(tl.int64) * width + j
    if LAST:
        starts = (samples * size + starts) * inputs
        steps = steps * inputs + channels
        return _gather(
            x_ptr, starts[:, None], y[:, None], x[:, None], has_position[:, None],
            steps[None, :], i[None, :], j[None, :], has_element[None, :], height, width,
        )  # fmt: skip
    starts += samples * inputs * size
    steps += channels * size
    lying = _gather(
        x_ptr, starts[None, :], y[None, :], x[None, :], has_position[None, :],
        steps[:, None], i[:, None], j[:, None], has_element[:, None], height, width,
    )  # fmt: skip
    return tl.trans(lying)


@triton.jit(
    do_not_specialize=[
        "places", "steps", "positions", "columns", "height", "width", "window",
    ]
)  # fmt: skip
def conv_gradient_kernel(
    signal_ptr, x_ptr, sums_ptr, bias_sums_ptr,
    places, steps, positions, columns, height, width, window,
    LAYER: tl.constexpr, SIGNAL_LAST: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of Σ signal · window for some units and elements, and of Σ signal, over `steps` blocks.

    Programs of the same part follow each other: they read the same pieces of the maps.
    """
    outputs: tl.constexpr = LAYER.groups * LAYER.units
    members, index = block(tl.program_id(0), LAYER.units, BLOCK_H)
    group = index % LAYER.groups
    # One block at least: without inputs there is still a bias.
    elements, part = block(index // LAYER.groups, tl.maximum(window, 1), BLOCK_K)
    has_unit = members < LAYER.units
    has_element = elements < window
    units = group * LAYER.units + members
    part = part.to(tl.int64)
    first = (part * steps * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)
    gradient = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    signals = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for step in range(steps):
        place = first + step * BLOCK_N
        has_place = place < places
        samples = (place // positions).to(tl.int64)
        position = place % positions
        signal = load_pixels(
            signal_ptr, samples, position, units, has_place, has_unit, positions, outputs,
            SIGNAL_LAST,
        )  # fmt: skip
        x = _windows(
            x_ptr, samples, position, has_place, elements, has_element, group, columns, height,
            width, LAYER, LAST,
        )  # fmt: skip
        turned = tl.trans(signal.to(OPERAND))
        gradient = tl.dot(turned, x.to(OPERAND), gradient, input_precision=PRECISION)
        if bias_sums_ptr is not None:
            signals += signal.to(tl.float32)
    at = (part * outputs + units)[:, None] * window + elements[None, :]
    tl.store(sums_ptr + at, gradient, mask=has_unit[:, None] & has_element[None, :])
    if bias_sums_ptr is not None:
        first_elements = tl.min(elements, 0) == 0
        at = part * outputs + units
        tl.store(bias_sums_ptr + at, tl.sum(signals, 0), mask=has_unit & first_elements)


@triton.jit
def _add_parts(sums_ptr, at, inside, size, parts, BLOCK: tl.constexpr):
    """Sum of all parts of some elements, in float32 and in an order that depends on `parts` alone."""
    total = tl.zeros([16, BLOCK], tl.float32)
    for start in range(0, parts, 16):
        part = start + tl.arange(0, 16)
        offsets = part.to(tl.int64)[:, None] * size + at[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        total += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["size", "outputs", "parts", "taps", "blocks"])
def conv_learn_kernel(
    sums_ptr, bias_sums_ptr, weight, bias, feedback, rule, scale, feedback_scale,
    size, outputs, parts, taps, blocks,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the parts of some weights' gradient, or of some biases', and write what comes of it.

    The gradient lies there as [out, tap, channel], the weight as [out, channel, tap].
    """
    program = tl.program_id(0)
    if program < blocks:
        places = program.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        unit_and_channel = places // taps
        rows = (unit_and_channel // CHANNELS).to(tl.int64) * taps + places % taps
        at = rows * CHANNELS + unit_and_channel % CHANNELS
        gradient = scale * _add_parts(sums_ptr, at, inside, size, parts, BLOCK)
        scalars = prepare(weight, rule, EPILOGUE)
        write(weight, rule, scalars, places, inside, gradient, EPILOGUE)
        if feedback.data is not None:
            scalars = prepare(feedback, rule, EPILOGUE)
            write(feedback, rule, scalars, places, inside, feedback_scale * gradient, EPILOGUE)
    elif bias.data is not None:
        units = (program - blocks) * BLOCK + tl.arange(0, BLOCK)
        has_unit = units < outputs
        gradient = scale * _add_parts(bias_sums_ptr, units, has_unit, outputs, parts, BLOCK)
        write(bias, rule, prepare(bias, rule, EPILOGUE), units, has_unit, gradient, EPILOGUE)


def _blocks(maps: Tensor, units: int, window: int) -> Blocks:
    """Tiles of the gradient, and how many positions are read at a time."""
    deepest, stages = (32, 3) if on_matrix_units(maps) else (16, 2)
    return Blocks(deepest, fit(units), fit(window), 8, stages)


def _shares(places: int, tiles: int, per_step: int) -> tuple[int, int]:
    """In how many parts a sum over `places` is shared out, and how many steps each of them takes."""
    steps = triton.cdiv(places, per_step)
    each = max(1, triton.cdiv(steps, max(1, _PROGRAMS // max(1, tiles))))
    return triton.cdiv(steps, each), each


def _learn(
    signal: Tensor,
    x: Tensor,
    scale: float,
    geometry: tuple[int, ...],
    weight: Tensor,
    learning: Learning,
    feedback: Target,
    feedback_scale: float,
) -> None:
    """Two launches that write what `learning` says, and `feedback`; `weight` says the sizes."""
    outputs, channels, kernel_h, kernel_w = weight.shape
    place, taps = Geometry(*geometry), kernel_h * kernel_w
    layer = Layer(kernel_w, max(1, channels), outputs // place.groups, *place)
    batch, _, height, width = x.shape
    columns, positions = signal.shape[3], signal.shape[2] * signal.shape[3]
    window = channels * taps
    blocks = _blocks(x, layer.units, window)
    tiles = triton.cdiv(layer.units, blocks.BLOCK_H) * layer.groups
    tiles *= max(1, triton.cdiv(window, blocks.BLOCK_K))
    parts, steps = _shares(batch * positions, tiles, blocks.BLOCK_N)
    sums = x.new_empty(parts, outputs, window, dtype=torch.float32)
    has_bias = learning.bias.data is not None
    bias_sums = x.new_empty(parts, outputs, dtype=torch.float32) if has_bias else None
    launch(
        conv_gradient_kernel, (tiles * parts,), signal, x, sums, bias_sums,
        batch * positions, steps, positions, columns, height, width, window, on=x, LAYER=layer,
        SIGNAL_LAST=lies_last(signal), LAST=lies_last(x),
        INDEX=index_type(parts * steps * blocks.BLOCK_N),
        **products(x, blocks),
    )  # fmt: skip
    of_weight = triton.cdiv(weight.numel(), BLOCK)
    of_bias = triton.cdiv(outputs, BLOCK) if has_bias else 0
    launch(
        conv_learn_kernel, (of_weight + of_bias,), sums, bias_sums, on=x,
        **learning._asdict(), feedback=feedback, scale=scale, feedback_scale=feedback_scale,
        size=weight.numel(), outputs=outputs, parts=parts, taps=taps, blocks=of_weight,
        CHANNELS=layer.channels, INDEX=index_type(weight.numel()), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def conv_grad(signal: Tensor, x: Tensor, scale: float, *rest: Any) -> None:
    """The gradients, written or added to those given; `rest` is the geometry and the targets."""
    *geometry, grad_weight, grad_bias, accumulate = rest
    learning = keep_gradients(grad_weight, grad_bias, accumulate)
    _learn(signal, x, scale, tuple(geometry), grad_weight, learning, Target(None), 1.0)


def conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    scale: float,
    feedback_scale: float,
    *rest: Any,
) -> None:
    """Weight, bias, feedback and their state updated in place."""
    geometry, update, of_feedback = rest[:7], rest[7:21], rest[21:]
    learning = learn_in_place(weight, bias, update)
    target = make_target(feedback, *of_feedback)
    _learn(signal, x, scale, geometry, weight, learning, target, feedback_scale)
