"""What every launch shares: the device guard, block sizes, operand type and precision of products."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from bpfree_kernels import backends
from bpfree_kernels.checks import GPU_DTYPES

_OPERAND = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """Tile sizes of a kernel of a dense layer (N samples, H outputs, K inputs), and how it is run.

    The tables in this package were chosen from compiled code (no spills, shared memory that fits every
    target), not from timings.
    """

    BLOCK_N: int
    BLOCK_H: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, on: Tensor, **options: Any) -> None:
    """Run a kernel on the device and the current stream of the tensor `on`, unless its grid is empty.

    Raises:
        TypeError: `on` has a dtype that the kernels do not compute in (float64 in the interpreter).
    """
    if on.dtype not in GPU_DTYPES:
        raise TypeError(f"backend 'triton' computes in float32 or less, got {on.dtype}.")
    if math.prod(grid) == 0:  # an empty batch; a launch of nothing is an error to CUDA
        return
    with torch.cuda.device_of(on):
        kernel[grid](*args, **options)


def sizes(**named: int) -> dict[str, int]:
    """Row lengths as arguments of a kernel: `inputs` = 1000 becomes ``inputs=125, INPUTS_BY=8``.

    The kernel multiplies them again, and so its compiler knows how far rows are aligned: 16 bytes are
    loaded at a time where they are. It looks by itself for multiples of 16 elements only.
    """
    arguments = {}
    for name, size in named.items():
        by = math.gcd(size, 8)
        arguments |= {name: size // by, f"{name.upper()}_BY": by}
    return arguments


def index_type(count: int) -> Any:
    """The type of indices up to `count`, and of a block more: int32 where it is wide enough.

    A division takes several times as long in int64.
    """
    return tl.int32 if count < 2**31 - 2**16 else tl.int64


def precision(tensor: Tensor) -> str:
    """Precision of float32 products: exact to float32 unless torch's own switch allows TF32.

    ROCm has float32 matrix units, so that TF32 would only lose digits there.
    """
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if allow_tf32 and tensor.dtype == torch.float32 else "ieee"


def on_matrix_units(tensor: Tensor) -> bool:
    """Whether products of tensors like this one run on matrix units, or on plain multiply-adds."""
    exact = tensor.dtype == torch.float32 and precision(tensor) == "ieee"
    return not exact or torch.version.hip is not None


def products(tensor: Tensor, blocks: Blocks) -> dict[str, Any]:
    """Constants and options of a kernel with matrix products of tensors like this one.

    16-bit operands go to the matrix units as they are, but the interpreter's bfloat16 arithmetic is
    wrong, so there they are widened.
    """
    operand = tl.float32 if backends.interpreting() else _OPERAND[tensor.dtype]
    options = {"OPERAND": operand, "PRECISION": precision(tensor), **blocks._asdict()}
    if torch.version.hip is not None:
        # A warp has 64 threads there; one stage lies in the 64 KB of local memory, the next in registers.
        options |= {"num_warps": blocks.num_warps // 2, "num_stages": 2}
    elif on_matrix_units(tensor):
        # Else ptxas spills a few bytes, for an occupancy that these small grids cannot use. Loops of
        # plain multiply-adds, on the other hand, would take every register that they may.
        options["maxnreg"] = 255
    return options
