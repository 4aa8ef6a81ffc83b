"""The CUDA bodies on the CPU: their own sources, compiled against `cuda_on_cpu`, against the reference.

Everything but the GPU is real: the launches with their grids and arguments, the products, the memory.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends
from bpfree_kernels.examples import example_args
from bpfree_kernels.geometry import same_margins

ROOT = Path(__file__).parents[2]
OPS = [name for name in backends.ops() if "cuda" in backends.bodies_of(name)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py has it


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The compiled bodies, registered as CPU bodies of the ops of a library ``bpfree_on_cpu``."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "libbodies.so"
    torch_dir, here = Path(torch.__file__).parent, Path(__file__).parent / "cuda_on_cpu"
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-attributes", "-DUSE_CUDA",
        TORCH_TARGET, f"-I{here}", f"-I{torch_dir / 'include'}", str(here / "bodies.cpp"),
        "-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-Bsymbolic",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ops = torch.library.Library("bpfree_on_cpu", "DEF")
    for name in OPS:
        schema = str(getattr(torch.ops.bpfree, name).default._schema)
        ops.define(schema.removeprefix("bpfree::"))
    torch.ops.load_library(str(library))
    yield ctypes.CDLL(str(library))
    ops._destroy()


def _tensors(result: Any, args: list[Any]) -> list[Tensor]:
    """What a call returned and what it may have changed."""
    returned = result if isinstance(result, tuple) else (result,)
    return [value for value in (*returned, *args) if isinstance(value, Tensor)]


def _check(name: str, args: Any, scale: float = 0.0) -> list[Tensor]:
    """Run an op's CUDA body, against the reference in float64 on the same numbers; what it returned.

    Rounding is relative to the largest value of a result, or to `scale` where that is larger.
    """
    mine, wide = list(args), list(args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            mine[i], wide[i] = value.clone(), value.double()
    result = getattr(torch.ops.bpfree_on_cpu, name)(*mine)
    wanted = _tensors(backends.body(name, "cpu", "reference")(*wide), wide)
    for got, exact in zip(_tensors(result, mine), wanted, strict=True):
        assert got.shape == exact.shape
        epsilons = 32 if torch.finfo(got.dtype).bits >= 32 else 4
        largest = max(exact.abs().max().item(), scale) if exact.numel() else 0.0
        assert ((got - exact).abs() <= epsilons * torch.finfo(got.dtype).eps * largest).all(), name
    return _tensors(result, [])


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _nearly_orthogonal(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.linalg.qr(_normal(size, size, dtype=torch.float64))[0]
    return (
        (rows + 0.02 / size**0.5 * _normal(size, size, dtype=torch.float64, seed=1))
        .to(dtype)
        .contiguous()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_examples(device: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    _check(name, example_args(name, "cpu", dtype))


MAPS = {
    "no overlap": ((1, 4, 6), (2, 3), {"stride": (2, 3)}),
    "gaps": ((2, 7, 8), (2, 2), {"stride": 3}),
    "overlap": ((1, 5, 7), (3, 3), {"padding": 1}),
    "stride 2": ((2, 6, 5), (3, 3), {"stride": 2, "padding": 1}),
    "TensorFlow's same": ((1, 6, 7), (3, 2), {"stride": 2, "padding": "same"}),
    "wide stride, same": ((1, 5, 7), (5, 3), {"stride": (2, 3), "padding": "same"}),
    "dilation": ((1, 7, 9), (2, 3), {"dilation": (3, 2), "padding": (2, 1)}),
    "one pixel": ((9, 1, 1), (1, 1), {}),
    "several blocks": ((3, 13, 11), (2, 1), {"padding": 1}),
}
"""Channels and size of the input, kernel, and the rest of the geometry."""


def _place(
    case: str,
) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, ...], tuple[int, int]]:
    """Input, kernel and geometry in schema order of one of `MAPS`, and the size of the output."""
    entering, kernel, options = MAPS[case]
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    padding = options.get("padding", 0)
    steps, apart, pads = (
        v if isinstance(v, tuple) else (v, v) for v in (stride, dilation, padding)
    )
    margins = tuple((pad, pad) for pad in pads)
    if padding == "same":
        margins = same_margins(entering[1:], kernel, stride, dilation)
    gives = tuple(
        (size + sum(margin) - d * (k - 1) - 1) // s + 1
        for size, margin, k, s, d in zip(entering[1:], margins, kernel, steps, apart, strict=True)
    )
    return entering, kernel, (*steps, margins[0][0], margins[1][0], *apart, 1), gives


ORDERS = list(itertools.product((torch.contiguous_format, torch.channels_last), repeat=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAPS)
def test_reconstruct(device: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    """Every geometry and order in memory, with and without a nudge and a bias."""
    (channels, *size), kernel, place, gives = _place(case)
    out = channels * kernel[0] * kernel[1]
    inverse = _nearly_orthogonal(out, dtype).view(out, channels, *kernel)
    x, output = (
        _normal(3, channels, *size, dtype=dtype),
        _normal(3, out, *gives, dtype=dtype, seed=1),
    )
    bias, rate = _normal(out, dtype=dtype, seed=2), _normal(3, dtype=dtype, seed=3).abs()
    target = _normal(3, out, *gives, dtype=dtype, seed=4)
    for of_x, of_output in ORDERS:
        maps = output.contiguous(memory_format=of_output), x.contiguous(memory_format=of_x)
        for more in ((bias, target, rate), (None, target, rate), (bias, None, None)):
            args = (*maps, inverse, *more, *place, "leaky_relu", 0.1)
            result = _check("invertible_conv_reconstruct", args)
            assert result[0].stride() == torch.empty_like(maps[1]).stride()
    other = target.contiguous(memory_format=torch.channels_last)
    args = (output, x, inverse, bias, other, rate, *place, "identity", 0.0)
    _check("invertible_conv_reconstruct", args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAPS)
def test_error(device: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    """Every geometry and order in memory, of all outputs that carry an error or some."""
    (channels, *size), kernel, place, gives = _place(case)
    out = channels * kernel[0] * kernel[1]
    inverse = _nearly_orthogonal(out, dtype).view(out, channels, *kernel)
    signal, gate = (
        _normal(2, out, *gives, dtype=dtype),
        _normal(2, channels, *size, dtype=dtype, seed=1),
    )
    for features, (of_signal, of_gate) in itertools.product((out, out // 2 + 1), ORDERS):
        carried = signal[:, :features].contiguous(memory_format=of_signal)
        rest = (*size, *place, "leaky_relu", 0.1)
        gated = gate.contiguous(memory_format=of_gate)
        (result,) = _check("invertible_conv_error", (carried, inverse[:features], gated, *rest))
        assert result.stride() == torch.empty_like(gated).stride()
        _check("invertible_conv_error", (carried, inverse[:features], None, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", bk.activations.ACTIVATIONS)
def test_gates(device: ctypes.CDLL, activation: str, dtype: torch.dtype) -> None:
    (channels, *size), kernel, place, gives = _place("overlap")
    inverse = _nearly_orthogonal(9, dtype).view(9, channels, *kernel)
    gate = 2 * _normal(2, channels, *size, dtype=dtype)
    gate[0, 0, 0, :3] = torch.tensor([0.0, 40.0, -40.0])
    signal = _normal(2, 9, *gives, dtype=dtype, seed=1)
    _check("invertible_conv_error", (signal, inverse, gate, *size, *place, activation, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 5, 33])
def test_inverses(device: ctypes.CDLL, size: int, dtype: torch.dtype) -> None:
    """Weights of one to several blocks of elements: products, series, refinement, symmetry."""
    weight = _nearly_orthogonal(size, dtype)
    (apart,) = _check("orthogonality", (weight,), scale=1.0)
    assert torch.equal(apart, apart.t())
    for terms in (1, 2, 7):
        _check("solve_nearly_orthogonal", (_normal(11, size, dtype=dtype), apart, 0.0, terms))
    _check("refine_inverse", (weight, weight), scale=1.0)


def test_a_signal_of_nothing_is_solved(device: ctypes.CDLL) -> None:
    """All zeros, none at all, NaN: the residual is the reference's."""
    apart = _normal(4, 4) / 10
    for signal in (torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 4), torch.nan)):
        value, residual = torch.ops.bpfree_on_cpu.solve_nearly_orthogonal(signal, apart, 0.0, 2)
        body = backends.body("solve_nearly_orthogonal", "cpu", "reference")
        assert torch.equal(value.isnan(), signal.isnan())
        wanted = body(signal, apart, 0.0, 2)[1]
        assert torch.allclose(residual, wanted, rtol=0, atol=0, equal_nan=True)


def test_lengths_whose_squares_are_no_floats(device: ctypes.CDLL) -> None:
    for scale in (1e-30, 1e30):
        signal, apart = scale * _normal(3, 4), _normal(4, 4) / 10
        _, residual = torch.ops.bpfree_on_cpu.solve_nearly_orthogonal(signal, apart, 0.0, 1)
        wanted = (signal.double() @ apart.double()).norm() / signal.double().norm()
        assert residual.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_nothing_at_all(device: ctypes.CDLL) -> None:
    """An empty batch, and an error that no output carries."""
    _, kernel, place, gives = _place("overlap")
    inverse = _nearly_orthogonal(9).view(9, 1, *kernel)
    x, output = torch.empty(0, 1, 5, 7), torch.empty(0, 9, *gives)
    rest = (*place, "leaky_relu", 0.1)
    _check("invertible_conv_reconstruct", (output, x, inverse, None, None, None, *rest))
    _check("invertible_conv_error", (output, inverse, x, 5, 7, *rest))
    args = (torch.empty(2, 0, *gives), inverse[:0], torch.ones(2, 1, 5, 7), 5, 7, *rest)
    assert not torch.ops.bpfree_on_cpu.invertible_conv_error(*args).any()


RULES = {
    "sgd": bk.SGD(0.1, weight_decay=0.02),
    "momentum": bk.SGD(0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": bk.SGD(torch.tensor(0.1), momentum=0.9, nesterov=True),
    "adam": bk.Adam(0.01, weight_decay=0.02),
    "adamw": bk.AdamW(torch.tensor(0.01, dtype=torch.float64), betas=(0.8, 0.99)),
}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("off_diagonal", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_update(device: ctypes.CDLL, rule: str, off_diagonal: bool, on_device: bool) -> None:
    """Every rule, with its learning rate and step read by the kernel or before."""
    update = RULES[rule]
    for dtype in (torch.float32, torch.float64):
        weight, grad = _normal(24, 2, 3, 4, dtype=dtype), _normal(24, 2, 3, 4, dtype=dtype, seed=1)
        apart = _normal(24, 24, dtype=dtype, seed=2)
        state = update.new_param_state(weight)
        if state.m is not None:
            state.m += 0.1 * _normal(24, 2, 3, 4, dtype=dtype, seed=3)
        if state.v is not None and state.step is not None:
            state.v += 0.1 * _normal(24, 2, 3, 4, dtype=dtype, seed=4) ** 2
            state.step += 5
        kept = (state.m, state.v, state.step)
        try:
            device.set_tensors_on_device(on_device)
            args = (grad, apart + apart.t(), weight, 0.3, off_diagonal, *update.args(), *kept)
            _check("orthogonal_update", args)
        finally:
            device.set_tensors_on_device(False)


def test_a_captured_graph_needs_its_scalars_on_the_device(device: ctypes.CDLL) -> None:
    args = example_args("orthogonal_update")
    weight = args[2].clone()
    try:
        device.set_stream_captures(True)
        with pytest.raises(RuntimeError, match="needs step and lr tensors on the device"):
            torch.ops.bpfree_on_cpu.orthogonal_update(*args)
    finally:
        device.set_stream_captures(False)
    assert torch.equal(args[2], weight)


def test_division_is_exact(device: ctypes.CDLL) -> None:
    """The multiplication that stands for a division, up to 2⁶³ and at every edge."""
    divisors = [1, 2, 3, 5, 7, 641, 2**16 + 1, 2**31 - 1, 2**32, 2**32 + 1, 10**12 + 39, 2**62 + 1]
    quotient, remainder = ctypes.c_int64(), ctypes.c_int64()
    for divisor in divisors:
        most = (2**63 - 1) // divisor
        multiples = {0, 1, 2, most // 3, most // 2 + 1, most - 1, most}
        numbers = {divisor * m + off for m in multiples for off in (-1, 0, 1)} | {2**63 - 1}
        for n in sorted(n for n in numbers if 0 <= n < 2**63):
            device.divide(
                ctypes.c_int64(n), ctypes.c_int64(divisor),
                ctypes.byref(quotient), ctypes.byref(remainder),
            )  # fmt: skip
            assert (quotient.value, remainder.value) == divmod(n, divisor)


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(device: ctypes.CDLL, blocks: int) -> None:
    """Elements that outnumber the grid are taken in turns."""
    values, sums = _normal(1000, dtype=torch.float64), torch.full((blocks,), torch.nan).double()
    device.squares(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(1000),
        ctypes.c_int64(blocks), ctypes.c_void_p(sums.data_ptr()),
    )  # fmt: skip
    assert sums.sum().item() == pytest.approx(values.square().sum().item(), rel=1e-13)
