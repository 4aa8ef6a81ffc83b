"""DRTP's golden checks: dense layers, the signal of a map, labels, saturation.

D1 … D10 are the properties that a DRTP implementation has to have: the sum over the batch (D1), the
sign (D2), the un-pooled map of a convolution (D3), labels (D5), gather = one-hot product (D6),
saturated units learn nothing (D9), odd sizes (D10).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from .cases import drtp_case
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]


def test_gradients(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """D1, D10: output and both gradients, sums over the batch, at sizes around every block edge."""
    backend, device = target
    case = drtp_case(shape, dtype, device)
    case.check(case.grad(backend))


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_gates(activation: str, slope: float | None, target: Target, dtype: torch.dtype) -> None:
    """D1 for every activation: the signal is gated by f′(W x + b), kinks included."""
    backend, device = target
    case = drtp_case((9, 5, 7, 4), dtype, device, activation=activation, slope=slope)
    case.check(case.grad(backend))


@pytest.mark.parametrize("activation", ["tanh", "hardtanh"])
def test_sign_and_size_of_one_step(activation: str, target: Target, dtype: torch.dtype) -> None:
    """D2: one SGD step lowers W by exactly lr · dW, and b by lr · db."""
    backend, device = target
    case = drtp_case(dtype=dtype, device=device, activation=activation)
    before = case.clone()
    case.step(bk.SGD(lr=0.25), backend=backend)
    exact, by_torch = before.exact(), before.plain()
    for name, index in (("weight", -2), ("bias", -1)):
        old = before.tensors[name]
        wanted = to_numpy(old) - 0.25 * exact[index]
        check(name, case.tensors[name], wanted, old - 0.25 * by_torch[index])


def _map_case(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    rng = np.random.default_rng(7)
    draws = {"x": (2, 3, 5, 6), "weight": (4, 3, 3, 3), "bias": (4,), "feedback": (3, 4, 5, 6)}
    return {
        name: torch.from_numpy(rng.standard_normal(size) / 2).to(device, dtype)
        for name, size in draws.items()
    }


def test_convolution(target: Target) -> None:
    """D3: the signal lives on the map before pooling; db sums over batch and space."""
    backend, device = target
    t = _map_case(torch.float32, device)
    labels = torch.tensor([2, 0], device=device)
    z = F.conv2d(t["x"], t["weight"], t["bias"], padding=1)
    y, post = bk.drtp_signal(z, t["feedback"], labels, backend=backend)
    args = (t["feedback"], labels, "tanh", 0.0)
    by_torch = plain.drtp_signal(z, *args)
    exact = golden.drtp_signal(
        to_numpy(z), to_numpy(t["feedback"]), labels.cpu().numpy(), "tanh", 0.0
    )
    check("y", y, exact[0], by_torch[0])
    check("post", post, exact[1], by_torch[1])
    weight_grad = torch.nn.grad.conv2d_weight(t["x"], (4, 3, 3, 3), post, padding=1)
    by_torch_grad = torch.nn.grad.conv2d_weight(t["x"], (4, 3, 3, 3), by_torch[1], padding=1)
    patches = golden.conv_weight_grad(to_numpy(t["x"]), exact[1], kernel=3, padding=1)
    check("dW", weight_grad, patches, by_torch_grad)
    check("db", post.sum((0, 2, 3)), exact[1].sum((0, 2, 3)), by_torch[1].sum((0, 2, 3)))
    # The next layer sees the pooled map, but the gradient is not routed through the pooling.
    assert F.max_pool2d(y, 2).shape == (2, 4, 2, 3)
    assert torch.count_nonzero(post) == post.numel()


SIGNAL_SHAPES = [(1, 1), (5, 6), (17, 65), (3, 1, 1), (3, 17, 3), (2, 3, 5, 6), (2, 2, 2, 3, 3), (3, 1100),
                 (4, 0), (0, 5)]  # fmt: skip


@pytest.mark.parametrize("size", SIGNAL_SHAPES)
def test_signal_of_any_shape(size: tuple[int, ...], target: Target, dtype: torch.dtype) -> None:
    """Maps of any number of dimensions, an empty one too."""
    backend, device = target
    rng = np.random.default_rng(3)
    z, feedback = (
        torch.from_numpy(rng.standard_normal(s)).to(device, dtype) for s in (size, (4, *size[1:]))
    )
    labels = torch.from_numpy(rng.integers(0, 4, size[0])).to(device)
    results = bk.drtp_signal(z, feedback, labels, backend=backend)
    exact = golden.drtp_signal(to_numpy(z), to_numpy(feedback), labels.cpu().numpy(), "tanh", 0.0)
    by_torch = plain.drtp_signal(z, feedback, labels, "tanh", 0.0)
    for name, got, wanted, reference in zip(("y", "post"), results, exact, by_torch, strict=True):
        check(name, got, wanted, reference)
        assert got.data_ptr() != z.data_ptr() or z.numel() == 0


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, "channels_last"])
def test_signal_in_any_layout(layout: str, target: Target) -> None:
    """A map and its feedback may lie in memory in any way, and are not touched."""
    backend, device = target
    t = _map_case(torch.float32, device)
    labels = torch.tensor([1, 2, 0], device=device)
    z = t["feedback"] * 0.5 + 0.1
    if layout == "channels_last":
        awkward = [s.to(memory_format=torch.channels_last) for s in (z, t["feedback"])]
    else:
        awkward = [layouts.laid_out(s, layout).view for s in (z, t["feedback"])]
    snapshot = cases.Snapshot({"z": awkward[0], "feedback": awkward[1], "labels": labels})
    straight = bk.drtp_signal(z, t["feedback"], labels, backend=backend)
    for got, wanted in zip(
        bk.drtp_signal(*awkward, labels, backend=backend), straight, strict=True
    ):
        assert torch.equal(got, wanted)
    snapshot.check_unchanged()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
def test_labels_that_are_no_class(labels_dtype: torch.dtype, target: Target) -> None:
    """D5: where nobody checks labels, one out of range selects a zero row, never an address."""
    backend, device = target
    case = drtp_case(device=device)
    huge = torch.iinfo(labels_dtype)
    wild = torch.tensor([1, -1, 3, huge.max, huge.min], dtype=labels_dtype, device=device)
    case = case.using(labels=wild)
    grads = torch.full_like(case.weight, float("nan")), torch.full_like(case.bias, float("nan"))
    body = backends.body("drtp_linear_grad", device, backend)
    output = body(*case.tensors.values(), "tanh", 0.0, *grads, False)
    case.check((output, *grads))
    assert torch.count_nonzero(grads[0]) == case.weight.numel()  # sample 0 has a class
    post = backends.body("drtp_signal", device, backend)(
        output, case.tensors["feedback"], wild, "identity", 0.0
    )[1]
    assert torch.equal(post[1:], torch.zeros_like(post[1:]))


def test_gather_equals_one_hot_product(target: Target) -> None:
    """D6: selecting B's row is bit for bit the product of B with the one-hot label."""
    backend, device = target
    feedback = drtp_case(device=device).tensors["feedback"]
    labels = torch.tensor([2, 1, 1, 0], device=device)
    z = torch.zeros(4, feedback.shape[1], device=device)
    post = bk.drtp_signal(z, feedback, labels, activation="identity", backend=backend)[1]
    assert torch.equal(post, F.one_hot(labels, 3).to(feedback.dtype) @ feedback)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "hardtanh", "relu", "sign"])
def test_saturated_units_do_not_learn(activation: str, target: Target, dtype: torch.dtype) -> None:
    """D9: where f is flat (|z| > 20, for a sigmoid beyond any dtype) the gradient is exactly 0."""
    backend, device = target
    case = drtp_case(dtype=dtype, device=device, activation=activation)
    far = 800.0 if activation == "sigmoid" else 21.0
    bias = torch.full_like(case.bias, -far)
    if activation != "relu":
        bias[::2] = far
    case = case.using(bias=bias, weight=case.weight / 16)
    assert torch.count_nonzero(case.tensors["x"]) > 0
    grads = case.grad(backend)[1:]
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))
    before = case.clone()
    case.step(bk.SGD(lr=1.0), backend=backend)
    assert torch.equal(case.weight, before.weight)
    assert torch.equal(case.bias, before.bias)


WRONG = {
    "flipped sign": lambda y, dw, db, _: (y, -dw, -db),
    "mean over the batch": lambda y, dw, db, n: (y, dw / n, db / n),
    "doubled": lambda y, dw, db, _: (y, 2 * dw, 2 * db),
    "units in another order": lambda y, dw, db, _: (y, np.roll(dw, 1, 0), db),
    "no bias gradient": lambda y, dw, db, _: (y, dw, 0 * db),
    "output of no bias": lambda y, dw, db, _: (np.tanh(np.arctanh(y) - 0.25), dw, db),
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparison above has teeth: near misses of the formula fail it in every dtype."""
    case = drtp_case(dtype=precision)
    right = case.exact()
    near_miss = WRONG[wrong](*right, case.tensors["x"].shape[0])
    case.check(torch.from_numpy(result).to(precision) for result in right)
    with pytest.raises(AssertionError, match=r"result \d"):
        case.check(torch.from_numpy(result).to(precision) for result in near_miss)


@pytest.mark.parametrize("pair", [("relu", "identity"), ("hardtanh", "tanh"), ("tanh", "sigmoid")])
def test_wrong_activations_are_rejected(pair: tuple[str, str]) -> None:
    """… and so does the gate of another activation."""
    case = drtp_case(activation=pair[0])
    other = drtp_case(activation=pair[0])
    other.options["activation"] = pair[1]
    with pytest.raises(AssertionError, match=r"result \d"):
        case.check(torch.from_numpy(result).float() for result in other.exact())
