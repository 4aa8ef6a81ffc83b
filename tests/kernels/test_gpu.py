"""What only a GPU can show: graphs, streams, no waiting for the device, compiled kernels at full size.

Skipped where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bpfree
import bpfree_kernels as bk
from bpfree_kernels import backends
from bpfree_kernels.examples import EXAMPLES, example_args

from . import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def _tensors(result: Any, args: tuple[Any, ...]) -> list[Tensor]:
    returned = result if isinstance(result, tuple) else (result,)
    return [value for value in (*returned, *args) if isinstance(value, Tensor)]


def _eager(name: str) -> list[Tensor]:
    args = example_args(name, "cuda")
    return _tensors(backends.body(name, "cuda", None)(*args), args)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", EXAMPLES)
def test_cuda_graph(name: str) -> None:
    """A replayed graph computes what the call would: nothing allocated by value, no waiting."""
    wanted = _eager(name)  # also compiles, which no graph may contain
    args = example_args(name, "cuda")
    before = [value.clone() if isinstance(value, Tensor) else value for value in args]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = backends.body(name, "cuda", None)(*args)
    for value, saved in zip(args, before, strict=True):
        if isinstance(value, Tensor):
            value.copy_(saved)
    graph.replay()
    for got, exact in zip(_tensors(result, args), wanted, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("name", EXAMPLES)
def test_side_stream(name: str) -> None:
    """Work goes to the current stream: it waits for what was put there before."""
    wanted = _eager(name)
    args = example_args(name, "cuda")
    late = [torch.full_like(v, torch.nan) if _is_float(v) else v for v in args]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms, so that a launch elsewhere would come first
        for value, source in zip(late, args, strict=True):
            if _is_float(value):
                value.copy_(source)
        result = backends.body(name, "cuda", None)(*late)
    stream.synchronize()
    for got, exact in zip(_tensors(result, tuple(late)), wanted, strict=True):
        assert torch.equal(got, exact)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _calls(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    """Names and arguments of the ops of a dense layer and of PEPITA, each with tensors of its own."""
    batch, inputs, outputs, classes = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to("cuda", dtype)

    x, z, mask = normal(batch, inputs), normal(batch, outputs), normal(batch, outputs)
    weight, bias = normal(outputs, inputs, scale=inputs**-0.5), normal(outputs)
    grads = [normal(outputs, inputs, scale=0.1), normal(outputs, scale=0.1), True]
    rule = bk.SGD(0.5, momentum=0.9)
    update = [*rule.args(), grads[0], None, None, grads[1], None, None]
    labels = torch.arange(batch, device="cuda") % outputs
    yield "dense_forward", [x, weight, bias, "tanh", 0.0]
    beside = [normal(outputs, inputs), normal(outputs, inputs, scale=0.1)]
    yield "dense_step", [z, x, weight, bias, None, 1 / batch, 1.0, *update, None, None, None]
    feedback_state = [beside[1], None, None]
    yield (
        "dense_step", [z, x, weight, bias, beside[0], 1 / batch, 0.1, *update, *feedback_state]
    )  # fmt: skip
    for most in (math.inf, 1.0):
        yield "apply_update", [weight, beside[0], 0.5, most, *rule.args(), beside[1], None, None]
    yield "ekdaa_linear_error", [z, weight, x, 0.9, "tanh", 0.0]
    yield "dense_grad", [z, x, 1 / batch, *grads]
    yield "classifier_forward", [x, weight, bias, labels, "ce", 0.0, 0.0]
    error, feedback = normal(batch, classes), normal(classes, inputs, scale=0.1)
    for change, rows in ((normal(batch, inputs), None), (error, feedback)):
        read = [z, x, change, rows, mask, weight]
        yield "pepita_linear_step", [*read, bias, "tanh", 0.0, *update]
        yield "pepita_linear_grad", [*read, "tanh", 0.0, *grads]
    yield "pepita_difference", [z, mask, None, "tanh", 0.0]
    yield "pepita_difference", [z, error, normal(classes, outputs), "tanh", 0.0]


@pytest.mark.parametrize("kind", bk.checks.GPU_DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*cases.SHAPES, (100, 500, 3000, 100)], ids=str)
def test_every_tile(layer: tuple[int, int, int, int], kind: torch.dtype) -> None:
    """Every tile of the compiled kernels, against the reference in float64 on the same numbers."""
    bound = (32 if kind == torch.float32 else 4) * torch.finfo(kind).eps
    for name, args in _calls(layer, kind):
        mine = [value.clone() if isinstance(value, Tensor) else value for value in args]
        wide = [value.double() if _is_float(value) else value for value in args]
        got = _tensors(backends.body(name, "cuda", "triton")(*mine), tuple(mine))
        wanted = _tensors(backends.body(name, "cuda", "reference")(*wide), tuple(wide))
        for value, exact in zip(got, wanted, strict=True):
            assert value.dtype in (kind, torch.int64)
            largest = exact.abs().max().clamp_min(torch.finfo(kind).tiny)
            assert (value - exact).abs().max() <= bound * largest, name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_never_waits(optimizer: str, no_waiting: None) -> None:
    """A learner's step only launches: labels are not read, nor is a step count."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).cuda()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, capturable=True),
    }[optimizer]
    learner = bpfree.DRTP(model, make(model.parameters()))
    x = torch.ones(8, 20, device="cuda")
    labels = torch.arange(8, device="cuda") % 5
    for _ in range(2):
        learner.step(x, labels)


def test_checked_labels() -> None:
    """The mode for debugging finds on the GPU what is always found on the CPU."""
    x, weight = torch.ones(3, 4, device="cuda"), torch.ones(2, 4, device="cuda")
    labels = torch.tensor([0, 7, 1], device="cuda")
    bk.set_label_checks(on_gpu=True)
    try:
        with pytest.raises(IndexError, match="got 7 at position 1"):
            bk.classifier_grad(x, weight, None, labels)
    finally:
        bk.set_label_checks(on_gpu=False)
    output, *_ = bk.classifier_grad(x, weight, None, labels)
    assert torch.equal(output.error[1], output.output[1])  # "no class": an all-zero target


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device() -> None:
    """Tensors decide where a kernel runs, not the current device."""
    for name in EXAMPLES:
        args = example_args(name, "cuda:1")
        got = _tensors(backends.body(name, "cuda", None)(*args), args)
        for value, exact in zip(got, _eager(name), strict=True):
            assert value.device.index == 1 or value.device.type == "cpu"
            assert torch.equal(value.cpu(), exact.cpu())
