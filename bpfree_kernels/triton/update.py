"""An update rule on one parameter, in Triton (equations: `bpfree_kernels.update`)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.launch import launch, sizes
from bpfree_kernels.triton.optimizers import make_rule, make_target, prepare, write
from bpfree_kernels.update import UpdateArgs

BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def apply_kernel(
    grad_ptr, param, rule, size,
    EPILOGUE: tl.constexpr, BLOCK: tl.constexpr, SIZE_BY: tl.constexpr,
):  # fmt: skip
    """Apply a block of the gradient to its parameter."""
    size = size.to(tl.int64) * SIZE_BY  # a parameter may hold more than 2³¹ elements
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    gradient = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scalars = prepare(param, rule, EPILOGUE)
    write(param, rule, scalars, offsets, mask, gradient, EPILOGUE)


def apply_update(param: Tensor, grad: Tensor, *update: Any) -> None:
    """Apply `grad` to `param` in place; `update` is the rule and the state, in schema order."""
    rule, epilogue = make_rule(UpdateArgs(*update[:8]), param.device)
    target = make_target(param, *update[8:])
    grid = (triton.cdiv(param.numel(), BLOCK),)
    launch(
        apply_kernel, grid, grad, target, rule, on=param,
        **sizes(size=param.numel()), EPILOGUE=epilogue, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
