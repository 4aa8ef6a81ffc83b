"""An update rule on one parameter, in Triton (equations: `bpfree_kernels.ops.update`).

A gradient whose length matters is read twice: for its norm, as sums of squares that a fixed number of
programs leave in memory, and to apply it, where every program adds those sums up again. That is the same
order in all of them, and nothing for the host to wait for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.launch import launch, sizes
from bpfree_kernels.triton.optimizers import make_rule, make_target, prepare, write
from bpfree_kernels.update import UpdateArgs

BLOCK = 1024

_MOST_SUMS = 512


@triton.jit(do_not_specialize=["size", "steps"])
def squares_kernel(
    grad_ptr, sums_ptr, size, steps, BLOCK: tl.constexpr, SIZE_BY: tl.constexpr
):  # fmt: skip
    """The sum of squares of `steps` blocks of the gradient.

    In float64, as in the other bodies: the square of a float32 may not be one. It costs no time here,
    where reading does.
    """
    size = size.to(tl.int64) * SIZE_BY
    offsets = tl.program_id(0).to(tl.int64) * steps * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for _ in range(steps):
        gradient = tl.load(grad_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float64)
        squares += gradient * gradient
        offsets += BLOCK
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, 0))


@triton.jit(do_not_specialize=["size", "count"])
def apply_kernel(
    grad_ptr, sums_ptr, param, rule, scale, max_norm, size, count,
    EPILOGUE: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, SIZE_BY: tl.constexpr,
):  # fmt: skip
    """Apply a block of the gradient to its parameter, cut if there are sums of squares, `count` of them."""
    size = size.to(tl.int64) * SIZE_BY  # a parameter may hold more than 2³¹ elements
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    gain = tl.cast(scale, tl.float32)
    if sums_ptr is not None:
        places = tl.arange(0, SUMS)
        squares = tl.sum(tl.load(sums_ptr + places, mask=places < count, other=0.0), 0)
        length = tl.abs(scale) * tl.sqrt(squares)
        # a length that is no number cuts nothing: what made it so shall show where it is
        gain *= tl.where(length > max_norm, max_norm / length, 1.0).to(tl.float32)
    gradient = gain * tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scalars = prepare(param, rule, EPILOGUE)
    write(param, rule, scalars, offsets, mask, gradient, EPILOGUE)


def _sums_of_squares(grad: Tensor) -> Tensor:
    """What the blocks of a gradient add to its squared length, by as many programs as there are sums."""
    blocks = triton.cdiv(grad.numel(), BLOCK)
    steps = max(1, triton.cdiv(blocks, _MOST_SUMS))
    sums = grad.new_empty(triton.cdiv(blocks, steps), dtype=torch.float64)
    launch(
        squares_kernel, (sums.numel(),), grad, sums, on=grad,
        **sizes(size=grad.numel()), steps=steps, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return sums


def apply_update(param: Tensor, grad: Tensor, scale: float, max_norm: float, *update: Any) -> None:
    """Apply ``scale * grad``, cut to the length `max_norm`, to `param` in place.

    `update` is the rule and the state, in schema order.
    """
    rule, epilogue = make_rule(UpdateArgs(*update[:8]), param.device)
    target = make_target(param, *update[8:])
    sums = _sums_of_squares(grad) if max_norm < math.inf else None
    grid = (triton.cdiv(param.numel(), BLOCK),)
    launch(
        apply_kernel, grid, grad, sums, target, rule, scale, max_norm, on=param,
        **sizes(size=param.numel()), count=0 if sums is None else sums.numel(),
        EPILOGUE=epilogue, BLOCK=BLOCK, SUMS=_MOST_SUMS, num_warps=4,
    )  # fmt: skip
