"""PEPITA's golden checks: the literal two passes, masks, small errors, both ways through layer one.

P1 … P10 are the properties that an implementation has to have. Those of whole networks, of the
learner and of its convolution (P5, P6, P9, P11) belong to it; here stand those of the ops.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, golden_pepita, layouts, plain
from .cases import LayerCase, default_slope, pepita_case
from .golden_pepita import Hidden
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]

SMOOTH = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "hardtanh")
"""Activations that do not jump."""


def relative(got: Tensor, exact: golden.Array) -> float:
    """Size of an error in proportion to the size of the result."""
    return float(np.linalg.norm(to_numpy(got) - exact) / np.linalg.norm(exact))


def test_gradients(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """The change and both gradients, at sizes around every block edge."""
    backend, device = target
    case = pepita_case(shape, dtype, device)
    case.check(case.grad(backend))


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_activations(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """Every activation, in a first layer and in a later one."""
    backend, device = target
    for feedback in (True, False):
        case = pepita_case(
            (9, 5, 7, 4), dtype, device, activation=activation, slope=slope, feedback=feedback
        )
        case.check(case.grad(backend))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("feedback", [True, False])
def test_what_may_be_left_out(
    feedback: bool, bias: bool, mask: bool, target: Target, dtype: torch.dtype
) -> None:
    """Feedback, bias and mask, each given or not, for both ops."""
    backend, device = target
    case = pepita_case((19, 7, 6, 3), dtype, device, feedback=feedback, bias=bias, mask=mask)
    case.check(case.grad(backend))
    before = case.clone()
    before.check(case.step(bk.SGD(lr=0.5), backend=backend))
    names = ("weight", "bias") if bias else ("weight",)
    for name, exact, by_torch in zip(names, before.exact()[1:], before.plain()[1:], strict=True):
        old = before.tensors[name]
        check(name, case.tensors[name], to_numpy(old) - 0.5 * exact, old - 0.5 * by_torch)


@pytest.mark.parametrize("classes", [1, 4, 5, 17, 70, 130])
def test_both_ways_through_the_first_layer(
    classes: int, target: Target, dtype: torch.dtype
) -> None:
    """(W F) e for few classes, W (F e) for many: one result, and that of a change given as such."""
    backend, device = target
    case = pepita_case((17, 12, 9, classes), dtype, device, activation="tanh")
    case.check(case.grad(backend))
    change, feedback = case.tensors["change"], case.tensors["feedback"]
    perturbation = (change.double() @ feedback.double().t()).to(dtype)
    case.using(change=perturbation, feedback=None).check(case.grad(backend))


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, "contiguous"])
@pytest.mark.parametrize("classes", [3, 9])
def test_feedback_in_any_layout(classes: int, layout: str, target: Target) -> None:
    """[in, classes] as it is, or the transpose of [classes, in]: the same bits."""
    backend, device = target
    case = pepita_case((6, 10, 9, classes), device=device)
    feedback = case.tensors["feedback"]
    if layout != "contiguous":
        feedback = layouts.laid_out(feedback, layout).view
    transposed = case.using(feedback=case.tensors["feedback"].t().contiguous().t())
    for got, wanted in zip(
        case.using(feedback=feedback).grad(backend), transposed.grad(backend), strict=True
    ):
        assert torch.equal(got, wanted)


def network(dtype: torch.dtype, device: str, masks: bool) -> dict[str, Tensor | None]:
    """Two hidden layers of 11 and 9 units, 4 classes, 13 samples of 8 inputs."""
    rng = np.random.default_rng(2)
    sizes = {"x": (13, 8), "w1": (11, 8), "b1": (11,), "w2": (9, 11), "b2": (9,), "w3": (4, 9),
             "b3": (4,), "feedback": (8, 4)}  # fmt: skip
    tensors: dict[str, Tensor | None] = {
        name: torch.from_numpy(rng.standard_normal(size) / 2).to(device, dtype)
        for name, size in sizes.items()
    }
    for name, units in (("m1", 11), ("m2", 9)):
        kept = torch.from_numpy((rng.random((13, units)) < 0.75) * 1.25).to(device, dtype)
        tensors[name] = kept if masks else None
    return tensors


def first_pass(
    t: dict[str, Tensor | None], activation: str, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Pre-activations of both hidden layers, and what each layer sees: x, h₁, h₂."""
    zs, seen = [], [t["x"]]
    for k in ("1", "2"):
        z, h = bk.dense_forward(
            seen[-1], t["w" + k], t["b" + k], activation=activation, backend=backend
        )
        zs.append(z)
        seen.append(h if t["m" + k] is None else h * t["m" + k])
    return zs, seen


def learn(
    t: dict[str, Tensor | None], labels: Tensor, activation: str, backend: str,
    modulated: bool, second_error: bool,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """One step of PEPITA, built of the library's ops: the gradients of all three layers."""
    zs, seen = first_pass(t, activation, backend)
    outputs = bk.classifier_forward(seen[-1], t["w3"], t["b3"], labels, backend=backend)
    change, feedback = outputs.error, t["feedback"]
    offset = outputs.error @ feedback.t()  # of the input of the layer, in the second pass
    gradients = []
    for index, k in enumerate(("1", "2")):
        pre = seen[index] + offset if modulated else seen[index]
        change, *grads = bk.pepita_linear_grad(
            zs[index], pre, change, t["w" + k], t["b" + k], feedback=feedback, mask=t["m" + k],
            activation=activation, backend=backend,
        )  # fmt: skip
        gradients.append(tuple(grads))
        feedback, offset = None, change
    pre = seen[-1] + change if modulated else seen[-1]
    if second_error:
        again = bk.classifier_forward(seen[-1] + change, t["w3"], t["b3"], labels, backend=backend)
        error = again.error
    else:
        error = outputs.error
    last = bk.dense_grad(error, pre, t["w3"], t["b3"], scale=1 / len(pre), backend=backend)
    return [*gradients, last]


def two_passes(
    t: dict[str, Tensor | None], labels: Tensor, activation: str, modulated: bool, second: bool
) -> list[golden_pepita.Gradients]:
    """The same step as the paper prints it."""
    a = {name: None if value is None else to_numpy(value) for name, value in t.items()}
    layers = [Hidden(a["w" + k], a["b" + k], a.get("m" + k)) for k in "123"]
    return golden_pepita.two_passes(
        a["x"], layers[:2], layers[2], a["feedback"], labels.cpu().numpy(), activation,
        default_slope(activation, None), modulated=modulated, second_error=second,
    )  # fmt: skip


LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}
"""Error of a whole network's gradients in proportion to them."""


@pytest.mark.parametrize("activation", SMOOTH)
def test_a_network_learns_as_the_two_passes_say(
    activation: str, target: Target, dtype: torch.dtype
) -> None:
    """P1, P2, P3, P8: three layers, a mask that both passes share and that counts once, or none."""
    backend, device = target
    t = network(dtype, device, masks=activation in ("identity", "relu", "tanh"))
    labels = torch.arange(13, device=device) % 4
    results = learn(t, labels, activation, backend, True, False)
    for wanted, layer in zip(two_passes(t, labels, activation, True, False), results, strict=True):
        for exact, got in zip(wanted, layer, strict=True):
            assert relative(got, exact) <= LIMITS[dtype]


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_options_of_the_rule(second: bool, modulated: bool, target: Target) -> None:
    """P1, P10: either pass's error at the output, either pass's activity as the presynaptic factor."""
    backend, device = target
    t = network(torch.float32, device, masks=True)
    labels = torch.arange(13, device=device) % 4
    results = learn(t, labels, "relu", backend, modulated, second)
    exact = {
        key: two_passes(t, labels, "relu", *key)
        for key in ((True, True), (True, False), (False, True), (False, False))
    }
    for index, layer in enumerate(results):
        wanted = exact[modulated, second][index].grad_weight
        assert relative(layer[0], wanted) <= LIMITS[torch.float32]
        if index == 2:  # the options are not all one
            others = [value[2].grad_weight for key, value in exact.items()
                      if key != (modulated, second)]  # fmt: skip
            assert all(relative(layer[0], other) > 1e-3 for other in others)


@pytest.mark.parametrize("activation", bk.ACTIVATIONS)
@pytest.mark.parametrize("feedback", [True, False])
def test_no_error_no_learning(
    feedback: bool, activation: str, target: Target, dtype: torch.dtype
) -> None:
    """P4: an error of 0 changes nothing, to the last bit."""
    backend, device = target
    case = pepita_case(dtype=dtype, device=device, activation=activation, feedback=feedback)
    case = case.using(change=torch.zeros_like(case.tensors["change"]))
    for result in case.grad(backend):
        assert torch.count_nonzero(result) == 0
    before = case.clone()
    case.step(bk.SGD(lr=1.0), backend=backend)
    assert torch.equal(case.weight, before.weight)
    assert torch.equal(case.bias, before.bias)


def test_units_that_switch(target: Target, dtype: torch.dtype) -> None:
    """P7: on, off, on to off, off to on; and units that land on the kink or leave it."""
    backend, device = target
    z = torch.tensor([[3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 0.0, 0.0, 0.0]], dtype=dtype, device=device)
    step = torch.tensor([2.0, 2.0, -5.0, 5.0, -3.0, 3.0, 2.0, -2.0, 0.0]).to(device, dtype)
    wanted = torch.tensor([[2.0, 0.0, -3.0, 2.0, -3.0, 0.0, 2.0, 0.0, 0.0]]).to(device, dtype)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    results = bk.pepita_linear_grad(z, 2 * one, one, step[:, None], step, backend=backend)
    for got, exact in zip(results, (wanted, -2 * wanted.t(), -wanted[0]), strict=True):
        assert torch.equal(got, exact)
    assert torch.equal(bk.pepita_difference(z, step[None], backend=backend), wanted)
    leaky = torch.tensor([[2.0, 0.5, -3.5, 2.75, -3.0, 0.75, 2.0, -0.5, 0.0]]).to(device, dtype)
    got = bk.pepita_difference(z, step[None], activation="leaky_relu", slope=0.25, backend=backend)
    assert torch.equal(got, leaky)


@pytest.mark.parametrize("feedback", [True, False])
def test_nothing_to_change_it(feedback: bool, target: Target) -> None:
    """No class to make an error, or no input to take it: the output does not change."""
    backend, device = target
    shape = (5, 4, 6, 0) if feedback else (5, 0, 6, 1)
    case = pepita_case(shape, device=device, feedback=feedback)
    for result in case.grad(backend):
        assert torch.count_nonzero(result) == 0


def test_no_units(target: Target) -> None:
    """A layer without units: a change and gradients without elements."""
    backend, device = target
    case = pepita_case((5, 4, 0, 3), device=device)
    assert [tuple(result.shape) for result in case.grad(backend)] == [(5, 0), (0, 4), (0,)]


def tiny_error(activation: str, dtype: torch.dtype, device: str) -> LayerCase:
    """A layer late in training: F as small as the paper's, and an error of about 1e-4."""
    case = pepita_case((64, 48, 24, 10), dtype, device, activation=activation)
    t = case.tensors
    return case.using(change=t["change"] * 1e-4, feedback=t["feedback"] * 0.05 * (2 / 48) ** 0.5)


def literally(case: LayerCase) -> tuple[Tensor, Tensor]:
    """The two passes in the layer's own dtype: the change, and the gradient of the weight."""
    t, slope = case.tensors, default_slope(case.options["activation"], None)
    z = t["z"] + F.linear(t["change"] @ t["feedback"].t(), t["weight"])
    first, second = (plain.activate(v, case.options["activation"], slope) for v in (t["z"], z))
    changed = (second - first) * t["mask"]
    return changed, -changed.t() @ t["pre"] / len(z)


@pytest.mark.parametrize("activation", [name for name in SMOOTH if name != "identity"])
def test_small_errors_keep_their_digits(activation: str, target: Target) -> None:
    """P3: the difference form loses nothing; two passes in float32 lose most of their digits."""
    backend, device = target
    case = tiny_error(activation, torch.float32, device)
    exact = case.exact()
    for got, wanted in zip(case.grad(backend), exact, strict=True):
        assert relative(got, wanted) <= 1e-6
    for got, wanted in zip(literally(case), exact[:2], strict=True):
        assert relative(got, wanted) > 1e-3


WRONG = {
    "flipped sign": lambda dh, dw, db: (dh, -dw, -db),
    "sum over the batch": lambda dh, dw, db: (dh, dw * 9, db * 9),
    "flipped change": lambda dh, dw, db: (-dh, dw, db),
    "mask counted twice": lambda dh, dw, db: (dh * 1.25, dw * 1.25, db * 1.25),
    "no bias gradient": lambda dh, dw, db: (dh, dw, 0 * db),
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparisons above have teeth: near misses of the formula fail them in every dtype."""
    case = pepita_case((9, 5, 7, 4), dtype=precision)
    right = case.exact()
    case.check(torch.from_numpy(result).to(precision) for result in right)
    with pytest.raises(AssertionError, match=r"result \d"):
        case.check(torch.from_numpy(result).to(precision) for result in WRONG[wrong](*right))
