"""Locally connected layers in Triton (equations: `bpfree_kernels.ops.local_conv`).

With a weight for each position there is little to compute with it and much to read: each kernel reads
every weight once, for as many samples as a block holds, and gathers what it multiplies them with from the
map. Of a window only the channels of a pixel may lie together, if they lie last. So a map with the channels
first is put in that order before, a copy k² times smaller than its windows: gathered one by one, each
element would be fetched with the 32 bytes around it. Results lie as the map that was given.

In the tiles N counts samples and H units of one group, outputs or, for the feedback, inputs. K counts what
is summed over or updated: elements of a window (tap, input channel), for the feedback the outputs of a
tap. A tap is a place in the kernel. Offsets in maps and weights are int64: both may hold more than 2³¹
elements.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.geometry import Geometry
from bpfree_kernels.maps import map_order
from bpfree_kernels.triton.activations import activate
from bpfree_kernels.triton.launch import Blocks, launch, on_matrix_units, products
from bpfree_kernels.triton.optimizers import (
    Learning,
    Target,
    keep_gradients,
    learn_in_place,
    make_target,
    prepare,
    write,
)
from bpfree_kernels.triton.windows import Layer, block, fit, position_above


@triton.jit
def _map_offsets(
    samples, pixel, channels, CHANNELS: tl.constexpr, pixels, LAST: tl.constexpr
):  # fmt: skip
    """Where some samples and channels of one pixel lie in a map, int64 [samples, channels]."""
    rows = samples.to(tl.int64)[:, None] * CHANNELS * pixels
    if LAST:
        return rows + pixel.to(tl.int64) * CHANNELS + channels[None, :]
    return rows + channels.to(tl.int64)[None, :] * pixels + pixel


@triton.jit
def _window(
    x_ptr, samples, elements, has_element, position, group, batch, height, width, columns,
    LAYER: tl.constexpr,
):  # fmt: skip
    """Elements (tap, channel) of the window of one position, [samples, elements]; 0 outside the map."""
    taps = elements // LAYER.channels
    i = (taps // LAYER.kernel_w).to(tl.int64)
    j = (taps % LAYER.kernel_w).to(tl.int64)
    y = position // columns * LAYER.stride_h - LAYER.pad_top + i * LAYER.dilation_h
    x = position % columns * LAYER.stride_w - LAYER.pad_left + j * LAYER.dilation_w
    inside = has_element & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row_length: tl.constexpr = LAYER.groups * LAYER.channels
    offsets = (y * width + x) * row_length + group * LAYER.channels + elements % LAYER.channels
    rows = samples.to(tl.int64)[:, None] * row_length * height * width
    mask = (samples < batch)[:, None] & inside[None, :]
    return tl.load(x_ptr + rows + offsets[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["batch", "height", "width", "positions", "columns", "window"])
def local_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, y_ptr, slope,
    batch, height, width, positions, columns, window,
    LAYER: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z of some samples and units at one position and, where `y_ptr` says where to, f(z)."""
    outputs: tl.constexpr = LAYER.groups * LAYER.units
    samples, index = block(tl.program_id(0), batch, BLOCK_N)
    members, index = block(index, LAYER.units, BLOCK_H)
    group = index % LAYER.groups
    position = (index // LAYER.groups).to(tl.int64)
    has_unit = members < LAYER.units
    units = group * LAYER.units + members
    weight_rows = weight_ptr + position * window * outputs + units[None, :]
    z = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, window, BLOCK_K):
        elements = start + tl.arange(0, BLOCK_K)
        has_element = elements < window
        x = _window(
            x_ptr, samples, elements, has_element, position, group, batch, height, width, columns,
            LAYER,
        )  # fmt: skip
        mask = has_element[:, None] & has_unit[None, :]
        rows = elements.to(tl.int64)[:, None] * outputs
        weight = tl.load(weight_rows + rows, mask=mask, other=0.0)
        z = tl.dot(x.to(OPERAND), weight.to(OPERAND), z, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + position * outputs + units, mask=has_unit, other=0.0)
        z += bias.to(tl.float32)[None, :]
    offsets = _map_offsets(samples, position, units, outputs, positions, LAST)
    mask = (samples < batch)[:, None] & has_unit[None, :]
    tl.store(z_ptr + offsets, z, mask=mask)
    if y_ptr is not None:
        y, _ = activate(z, slope, ACTIVATION)
        tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit(do_not_specialize=["batch", "pixels", "width", "rows", "columns", "taps"])
def local_feedback_kernel(
    signal_ptr, weight_ptr, gate_ptr, change_ptr, slope,
    batch, pixels, width, rows, columns, taps,
    LAYER: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f′(gate) times the feedback, to some samples and channels of one pixel.

    The windows that hold the pixel are gathered, not scattered to: no atomics, and each weight is read
    once here, too. A tap without such a window, at a border or between strides, reads nothing.
    """
    outputs: tl.constexpr = LAYER.groups * LAYER.units
    inputs: tl.constexpr = LAYER.groups * LAYER.channels
    blocks_of_tap: tl.constexpr = (LAYER.units + BLOCK_K - 1) // BLOCK_K
    samples, index = block(tl.program_id(0), batch, BLOCK_N)
    members, index = block(index, LAYER.channels, BLOCK_H)
    group = index % LAYER.groups
    pixel = index // LAYER.groups
    row = pixel // width
    column = pixel % width
    has_sample = (samples < batch)[:, None]
    has_channel = (members < LAYER.channels)[None, :]
    signal_rows = signal_ptr + samples.to(tl.int64)[:, None] * outputs * rows * columns
    weight_rows = weight_ptr + members.to(tl.int64)[None, :] * outputs
    change = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for step in range(taps * blocks_of_tap):  # one loop, so that it fetches ahead across taps
        tap = step // blocks_of_tap
        position, fits = position_above(row, column, tap, rows, columns, LAYER)
        of_group = step % blocks_of_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        has_unit = fits & (of_group < LAYER.units)
        units = group * LAYER.units + of_group
        of_signal = signal_rows + (position * outputs + units)[None, :]
        signal = tl.load(of_signal, mask=has_sample & has_unit[None, :], other=0.0)
        of_weight = weight_rows + (position * taps + tap) * (LAYER.channels * outputs)
        weight_mask = has_unit[:, None] & has_channel
        weight = tl.load(of_weight + units[:, None], mask=weight_mask, other=0.0)
        change = tl.dot(
            signal.to(OPERAND), weight.to(OPERAND), change, input_precision=PRECISION
        )  # fmt: skip
    channels = group * LAYER.channels + members
    offsets = _map_offsets(samples, pixel, channels, inputs, pixels, LAST)
    mask = has_sample & has_channel
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        _, derivative = activate(gate, slope, ACTIVATION)
        change *= derivative
    tl.store(change_ptr + offsets, change, mask=mask)


@triton.jit
def _write_where(
    mask_ptr, target, rule, offsets, inside, gradient, EPILOGUE: tl.constexpr
):  # fmt: skip
    """`write` where a connectivity mask is True; elsewhere a stored gradient is 0, and nothing learns."""
    if mask_ptr is not None:
        connected = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
        if EPILOGUE == "store":
            gradient = tl.where(connected, gradient, 0.0)
        else:
            inside &= connected
    write(target, rule, prepare(target, rule, EPILOGUE), offsets, inside, gradient, EPILOGUE)


@triton.jit(do_not_specialize=["batch", "height", "width", "positions", "columns", "window"])
def local_update_kernel(
    signal_ptr, x_ptr, weight_mask_ptr, feedback_mask_ptr, scale,
    batch, height, width, positions, columns, window, weight, bias, rule, feedback,
    LAYER: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one position's scale · windowᵀ · signal into `weight` and `feedback`.

    By the first program of each unit its ∂b goes into `bias`.
    """
    outputs: tl.constexpr = LAYER.groups * LAYER.units
    elements = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    members, index = block(tl.program_id(0), LAYER.units, BLOCK_H)
    group = index % LAYER.groups
    position = (index // LAYER.groups).to(tl.int64)
    has_element = elements < window
    has_unit = members < LAYER.units
    units = group * LAYER.units + members
    gradient = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    bias_gradient = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, batch, BLOCK_N):
        samples = start + tl.arange(0, BLOCK_N)
        x = _window(
            x_ptr, samples, elements, has_element, position, group, batch, height, width, columns,
            LAYER,
        )  # fmt: skip
        mask = (samples < batch)[:, None] & has_unit[None, :]
        places = _map_offsets(samples, position, units, outputs, positions, True)
        signal = tl.load(signal_ptr + places, mask=mask, other=0.0)
        patch = tl.trans(x.to(OPERAND))
        gradient = tl.dot(patch, signal.to(OPERAND), gradient, input_precision=PRECISION)
        if bias.data is not None:
            bias_gradient += tl.sum(signal.to(tl.float32), 0)
    gradient *= scale
    offsets = (position * window + elements)[:, None] * outputs + units[None, :]
    inside = has_element[:, None] & has_unit[None, :]
    _write_where(weight_mask_ptr, weight, rule, offsets, inside, gradient, EPILOGUE)
    if feedback.data is not None:
        _write_where(feedback_mask_ptr, feedback, rule, offsets, inside, gradient, EPILOGUE)
    if bias.data is not None and tl.program_id(1) == 0:
        scalars = prepare(bias, rule, EPILOGUE)
        of_bias = position * outputs + units
        write(bias, rule, scalars, of_bias, has_unit, scale * bias_gradient, EPILOGUE)


def _layer(weight: Tensor, geometry: tuple[int, ...]) -> Layer:
    place = Geometry(*geometry)
    kernel_w, channels, outputs = weight.shape[3:]
    return Layer(kernel_w, max(1, channels), outputs // place.groups, *place)


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _new_maps(like: Tensor, *shape: int) -> Tensor:
    order = map_order(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _product_blocks(maps: Tensor, units: int, depth: int) -> Blocks:
    """Tiles of a forward or feedback pass of some maps that sums over `depth` elements."""
    deepest = 32 if on_matrix_units(maps) else 16
    return Blocks(fit(maps.shape[0]), fit(units), fit(depth, deepest), 8, 3)


def _update_blocks(maps: Tensor, units: int, window: int) -> Blocks:
    """Tiles of an update: small ones, because weights and moments are what it waits for."""
    size, warps, stages = (2048, 8, 2) if on_matrix_units(maps) else (1024, 4, 1)
    height = fit(units)
    return Blocks(fit(maps.shape[0]), height, fit(window, size // height), warps, stages)


def local_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, slope: float, *geometry: int
) -> tuple[Tensor, Tensor]:
    """z and f(z), [batch, out, height, width]; an empty second tensor for the identity."""
    layer, (rows, columns) = _layer(weight, geometry), weight.shape[:2]
    batch, _, height, width = x.shape
    window = math.prod(weight.shape[2:5])
    z = _new_maps(x, batch, weight.shape[5], rows, columns)
    y = None if activation == "identity" else torch.empty_like(z)
    blocks = _product_blocks(x, layer.units, window)
    tiles = triton.cdiv(batch, blocks.BLOCK_N) * triton.cdiv(layer.units, blocks.BLOCK_H)
    launch(
        local_forward_kernel, (tiles * layer.groups * rows * columns,),
        _channels_last(x), weight, bias, z, y, slope,
        batch, height, width, rows * columns, columns, window, on=x, LAYER=layer,
        LAST=map_order(x) == torch.channels_last, ACTIVATION=activation, **products(x, blocks),
    )  # fmt: skip
    return z, z.new_empty(0) if y is None else y


def local_conv_feedback(
    signal: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    activation: str,
    slope: float,
    height: int,
    width: int,
    *geometry: int,
) -> Tensor:
    """f′(gate) ⊙ Wᵀ signal, [batch, in, height, width]; `gate` lies in memory as `signal` does."""
    layer = _layer(weight, geometry)
    rows, columns, kernel_h, kernel_w, channels, _ = weight.shape
    batch, pixels, taps = signal.shape[0], height * width, kernel_h * kernel_w
    change = _new_maps(signal, batch, channels * layer.groups, height, width)
    blocks = _product_blocks(signal, channels, layer.units)
    tiles = triton.cdiv(batch, blocks.BLOCK_N) * triton.cdiv(channels, blocks.BLOCK_H)
    launch(
        local_feedback_kernel, (tiles * layer.groups * pixels,),
        _channels_last(signal), weight, gate, change, slope,
        batch, pixels, width, rows, columns, taps, on=signal, LAYER=layer,
        LAST=map_order(signal) == torch.channels_last, ACTIVATION=activation,
        **products(signal, blocks),
    )  # fmt: skip
    return change


def _learn(
    signal: Tensor,
    x: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    scale: float,
    geometry: tuple[int, ...],
    weight: Tensor,
    learning: Learning,
    feedback: Target,
) -> None:
    """One launch that writes what `learning` says, and `feedback`; `weight` says the sizes."""
    layer, (rows, columns) = _layer(weight, geometry), weight.shape[:2]
    batch, _, height, width = x.shape
    window = math.prod(weight.shape[2:5])
    blocks = _update_blocks(x, layer.units, window)
    tiles = triton.cdiv(layer.units, blocks.BLOCK_H) * layer.groups * rows * columns
    # Without inputs there is still a bias to update.
    grid = (tiles, max(1, triton.cdiv(window, blocks.BLOCK_K)))
    launch(
        local_update_kernel, grid, _channels_last(signal), _channels_last(x), *masks, scale,
        batch, height, width, rows * columns, columns, window, on=x,
        LAYER=layer, **learning._asdict(), feedback=feedback, **products(x, blocks),
    )  # fmt: skip


def local_conv_grad(
    signal: Tensor, x: Tensor, mask: Tensor | None, scale: float, *rest: Any
) -> None:
    """The gradients, written or added to those given; `rest` is the geometry and the targets."""
    *geometry, grad_weight, grad_bias, accumulate = rest
    learning = keep_gradients(grad_weight, grad_bias, accumulate)
    masks = (mask, None)
    _learn(signal, x, masks, scale, tuple(geometry), grad_weight, learning, Target(None))


def local_conv_step(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor | None,
    weight_mask: Tensor | None,
    feedback_mask: Tensor | None,
    scale: float,
    *rest: Any,
) -> None:
    """Weight, bias, feedback and their state updated in place."""
    geometry, update, of_feedback = rest[:7], rest[7:21], rest[21:]
    learning = learn_in_place(weight, bias, update)
    target = make_target(feedback, *of_feedback)
    masks = (weight_mask, feedback_mask)
    _learn(signal, x, masks, scale, geometry, weight, learning, target)
