"""A dense layer in halves: its forward pass, and learning from a signal that is given.

What every layer op has in common (rules, layouts, buffers) is in `test_layer`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bpfree_kernels as bk

from . import cases, golden, layouts, plain
from .cases import default_slope, dense_case
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]


def layer(shape: tuple[int, ...], dtype: torch.dtype, device: str, activation: str) -> Any:
    """Input, weight and bias of a layer, as a DRTP layer has them."""
    tensors = cases.drtp_case((*shape, 1), dtype, device, activation=activation).tensors
    return tensors["x"], tensors["weight"], tensors["bias"]


def check_forward(result: bk.DenseOutput, args: Any, activation: str, slope: float | None) -> None:
    """Compare z and f(z) with the formulas."""
    slope = default_slope(activation, slope)
    arrays = [None if t is None else to_numpy(t) for t in args]
    z = golden.affine(*arrays)
    by_torch = torch.nn.functional.linear(*args)
    check("z", result.z, z, by_torch)
    exact = golden.activate(z, activation, slope)[0]
    check("output", result.output, exact, plain.activate(by_torch, activation, slope))


def test_forward(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """z and f(z) at sizes around every block edge, every second one without a bias."""
    backend, device = target
    x, weight, bias = layer(shape[:3], dtype, device, "tanh")
    args = (x, weight, bias if shape[2] % 2 else None)
    result = bk.dense_forward(*args, backend=backend)
    assert isinstance(result, bk.DenseOutput)
    check_forward(result, args, "tanh", None)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_forward_activations(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """Every activation; f(z) and z never share memory, and the arguments stay as they are."""
    backend, device = target
    args = layer((9, 5, 7), dtype, device, activation)
    snapshot = cases.Snapshot(dict(zip("xwb", args, strict=True)))
    result = bk.dense_forward(*args, activation=activation, slope=slope, backend=backend)
    check_forward(result, args, activation, slope)
    z = result.z.clone()
    result.output.fill_(9)
    assert torch.equal(result.z, z)
    snapshot.check_unchanged()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_forward_in_any_layout(layout: str, target: Target) -> None:
    """Everything that is read may lie in memory in any way."""
    backend, device = target
    args = layer((6, 10, 9), torch.float32, device, "tanh")
    laid = [layouts.laid_out(tensor, layout) for tensor in args]
    views = [entry.view for entry in laid]
    check_forward(bk.dense_forward(*views, backend=backend), args, "tanh", None)
    for entry in laid:
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.parametrize("empty", [(0, 5, 4), (0, 0, 3), (3, 4, 0), (3, 0, 4)])
def test_forward_of_nothing(empty: tuple[int, ...], target: Target) -> None:
    """No samples, no outputs or no inputs: empty outputs, or the bias."""
    backend, device = target
    args = layer(empty, torch.float32, device, "tanh")
    result = bk.dense_forward(*args, backend=backend)
    assert result.z.shape == result.output.shape == (empty[0], empty[2])
    check_forward(result, args, "tanh", None)


def test_forward_of_parameters(target: Target) -> None:
    """Parameters are taken as they are, and no graph is made."""
    backend, device = target
    args = [t.requires_grad_() for t in layer((3, 4, 5), torch.float32, device, "tanh")]
    for output in bk.dense_forward(*args, backend=backend):
        assert not output.requires_grad


def test_gradients(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Both gradients at sizes around every block edge."""
    backend, device = target
    case = dense_case(shape, dtype, device)
    case.check(case.grad(backend))


@pytest.mark.parametrize("scale", [1.0, -0.125, 1 / 3, 0.0])
def test_scales(scale: float, target: Target, dtype: torch.dtype) -> None:
    """Gradients with every kind of factor."""
    backend, device = target
    case = dense_case((9, 5, 7, 1), dtype, device, scale=scale)
    case.check(case.grad(backend))


@pytest.mark.parametrize("bias", [True, False])
def test_sign_and_size_of_one_step(bias: bool, target: Target, dtype: torch.dtype) -> None:
    """One SGD step lowers W by lr · scale · postᵀ pre, and b by lr · scale · Σ post."""
    backend, device = target
    case = dense_case(dtype=dtype, device=device, scale=2.0, bias=bias)
    before = case.clone()
    assert case.step(bk.SGD(lr=0.25), backend=backend) == ()
    names = ("weight", "bias") if bias else ("weight",)
    for name, exact, by_torch in zip(names, before.exact(), before.plain(), strict=True):
        old = before.tensors[name]
        check(name, case.tensors[name], to_numpy(old) - 0.25 * exact, old - 0.25 * by_torch)


def test_the_default_scale_is_one(target: Target) -> None:
    """Left out, the scale is 1: the sum over the batch."""
    backend, device = target
    tensors = dense_case(device=device).tensors
    case = dense_case(device=device, scale=1.0)
    case.check(bk.dense_grad(**tensors, backend=backend))
    before = case.clone()
    bk.dense_step(**case.tensors, update=bk.SGD(lr=1.0), backend=backend)
    wanted = before.bias - before.tensors["post"].sum(0)
    check("bias", case.bias, to_numpy(wanted), wanted)


def test_a_forward_pass_and_its_learning_are_one_drtp_layer(target: Target) -> None:
    """The halves, joined by the signal of the map, are the whole."""
    backend, device = target
    case = cases.drtp_case((19, 12, 11, 3), device=device)
    t = case.tensors
    z, output = bk.dense_forward(t["x"], t["weight"], t["bias"], backend=backend)
    _, post = bk.drtp_signal(z, t["feedback"], t["labels"], backend=backend)
    gradients = bk.dense_grad(post, t["x"], t["weight"], t["bias"], backend=backend)
    case.check((output, *gradients))


WRONG = {
    "flipped sign": lambda dw, db: (-dw, -db),
    "mean over the batch": lambda dw, db: (dw / 5, db / 5),
    "units in another order": lambda dw, db: (np.roll(dw, 1, 0), db),
    "unscaled bias": lambda dw, db: (dw, db / 2),
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparison above has teeth: near misses of the formula fail it in every dtype."""
    case = dense_case(dtype=precision, scale=2.0)
    right = case.exact()
    case.check(torch.from_numpy(result).to(precision) for result in right)
    with pytest.raises(AssertionError, match=r"result \d"):
        case.check(torch.from_numpy(result).to(precision) for result in WRONG[wrong](*right))
