"""The CUDA extension on a GPU: every op and dtype, large and small, waiting for nothing.

Skipped where there is none. Graphs, streams and second devices are in `test_gpu`, for all ops alike; what the
bodies compute in every case is in `test_cuda_bodies`, without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends
from bpfree_kernels.examples import example_args

OPS = [name for name in backends.ops() if "cuda" in backends.bodies_of(name)]
MAPS = [name for name in OPS if name.startswith("invertible_conv")]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.cuda is None, reason="needs a CUDA device"
    ),
]


def test_extension_is_used() -> None:
    assert backends.status("cuda").usable, backends.status("cuda").reason


def _check(name: str, args: Any, scale: float = 0.0) -> None:
    """The CUDA body against the reference in float64 on the same numbers, on the same device."""
    mine, wide = list(args), list(args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            mine[i] = value.clone()
            wide[i] = value.double()
    results = [
        backends.body(name, "cuda", backend)(*given)
        for backend, given in (("cuda", mine), ("reference", wide))
    ]
    got, wanted = (
        [
            value
            for value in (*(result if isinstance(result, tuple) else (result,)), *given)
            if isinstance(value, Tensor)
        ]
        for result, given in zip(results, (mine, wide), strict=True)
    )
    for value, exact in zip(got, wanted, strict=True):
        assert value.shape == exact.shape
        epsilons = 32 if torch.finfo(value.dtype).bits >= 32 else 4
        bound = epsilons * torch.finfo(value.dtype).eps * max(exact.abs().max().item(), scale)
        assert (value - exact).abs().max() <= bound, name


def _nearly_orthogonal(size: int, dtype: torch.dtype) -> Tensor:
    rows = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    near = rows + 0.02 / size**0.5 * torch.randn(size, size, dtype=torch.float64)
    return near.to("cuda", dtype).contiguous()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in OPS for dtype in (torch.float32, torch.float64)]
    + [(name, dtype) for name in MAPS for dtype in (torch.bfloat16, torch.float16)],
)
def test_every_op_and_dtype(name: str, dtype: torch.dtype) -> None:
    _check(name, example_args(name, "cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 17, 100, 1027])
def test_weights_of_many_blocks(size: int, dtype: torch.dtype) -> None:
    """1027² elements outnumber the largest grid."""
    torch.manual_seed(0)
    weight = _nearly_orthogonal(size, dtype)
    _check("orthogonality", (weight,), scale=1.0)
    apart = bk.orthogonality(weight, backend="cuda")
    assert torch.equal(apart, apart.t())
    signal = torch.randn(129, size, dtype=dtype, device="cuda")
    _check("solve_nearly_orthogonal", (signal, apart, 0.0, 6))
    _check("refine_inverse", (weight, weight), scale=1.0)
    for rule in (bk.SGD(0.1, momentum=0.9, nesterov=True), bk.AdamW(torch.tensor(0.1).cuda())):
        state = rule.new_param_state(weight)
        args = (torch.randn_like(weight), apart, weight, 0.3, True, *rule.args())
        _check("orthogonal_update", (*args, state.m, state.v, state.step))


@pytest.mark.parametrize("dtype", [*bk.checks.GPU_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 64])
def test_maps_of_many_blocks(batch: int, order: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inverse = _nearly_orthogonal(144, dtype).view(144, 16, 3, 3)
    x = torch.randn(batch, 16, 33, 35, dtype=dtype, device="cuda").contiguous(memory_format=order)
    output = torch.randn(batch, 144, 17, 18, dtype=dtype, device="cuda")
    output, target = (o.contiguous(memory_format=order) for o in (output, torch.randn_like(output)))
    place, rate = (2, 2, 1, 1, 1, 1, 1), torch.rand(batch, dtype=dtype, device="cuda")
    rest = (*place, "leaky_relu", 0.1)
    if batch == 0:  # nothing to compare
        body = backends.body("invertible_conv_error", "cuda", "cuda")
        assert body(output, inverse, x, 33, 35, *rest).shape == x.shape
        return
    _check("invertible_conv_error", (output, inverse, x, 33, 35, *rest))
    bias = torch.randn(144, dtype=dtype, device="cuda")
    _check("invertible_conv_reconstruct", (output, x, inverse, bias, target, rate, *rest))


def test_offsets_beyond_32_bits() -> None:
    """The last of many samples gets what it gets alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of memory")
    samples, size = 2**28 // 60**2, (60, 60)  # 9 values of each position: more than 2³¹ in all
    signal = torch.zeros(samples, 9, *size, dtype=torch.bfloat16, device="cuda")
    signal[-1].normal_()
    inverse = torch.eye(9, dtype=torch.bfloat16, device="cuda").view(9, 1, 3, 3)  # exact products
    body = backends.body("invertible_conv_error", "cuda", "cuda")
    rest = (inverse, None, *size, 1, 1, 1, 1, 1, 1, 1, "identity", 0.0)
    result = body(signal, *rest)
    assert signal.numel() > 2**31
    assert torch.equal(result[-1], body(signal[-1:].clone(), *rest)[0])
    assert not result[:-1].any()


@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_device(name: str) -> None:
    args = example_args(name, "cuda")
    backends.body(name, "cuda", "cuda")(*args)  # cuBLAS makes its workspace
    torch.cuda.set_sync_debug_mode("error")
    try:
        backends.body(name, "cuda", "cuda")(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_needs_its_step_on_the_device() -> None:
    *args, step = example_args("orthogonal_update", "cuda")
    body = backends.body("orthogonal_update", "cuda", "cuda")
    body(*args, step.cpu())  # without a graph it may lie there
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="needs step and lr tensors on the device"),
        torch.cuda.graph(graph),
    ):
        body(*args, step.cpu())
