"""An error kernel that learns beside the weight, from the same product: E1 and E8 of EKDAA's golden checks.

Dense layers and convolutions alike. What they do without an error kernel is in `test_layer`; the masks of
locally connected layers are in `test_local_conv_feedback`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from .cases import RULES, LayerCase
from .tolerances import check, to_numpy

Target = tuple[str, str]
Case = Callable[..., LayerCase]

pytestmark = pytest.mark.usefixtures("poisoned")

KINDS: dict[str, Case] = {"dense": cases.dense_case, "conv": cases.conv_case}
SHAPE = (5, 19, 17, 1)
GAMMA = 0.3


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """The function that makes each kind of layer."""
    return KINDS[request.param]


@dataclass
class Learner:
    """A layer with an error kernel, and all that its rule remembers."""

    case: LayerCase
    rule: bk.SGD | bk.Adam
    state: bk.LayerState
    feedback: Tensor
    feedback_state: bk.ParamState
    gamma: float = GAMMA

    def step(self, samples: dict[str, Tensor], backend: str) -> None:
        """Learn, W, b and E."""
        case = self.case.using(**samples)
        case.step_op(
            **case.tensors, **case.options, update=self.rule, state=self.state,
            feedback=self.feedback, feedback_state=self.feedback_state,
            feedback_scale=self.gamma, backend=backend,
        )  # fmt: skip

    def learnt(self) -> dict[str, tuple[Tensor, bk.ParamState]]:
        """What learns, by name: the parameter and its state."""
        return {
            "weight": (self.case.weight, self.state.weight),
            "bias": (self.case.tensors["bias"], self.state.bias),
            "feedback": (self.feedback, self.feedback_state),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and moment, by name."""
        named = {
            f"{name} {field}": getattr(state, field)
            for name, (_, state) in self.learnt().items()
            for field in ("m", "v", "step")
        }
        named |= {name: param for name, (param, _) in self.learnt().items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def make(
    kind: Case, rule: str, dtype: torch.dtype, device: str, *, start: float = 0.0,
    gamma: float = GAMMA,
) -> Learner:  # fmt: skip
    """A learner whose momenta (and squares of them) start as `start` times numbers in [0, 1)."""
    case, update = kind(SHAPE, dtype, device), cases.library_rule(RULES[rule])
    feedback = kind(SHAPE, dtype, device, seed=1).weight
    state = update.new_state(case.weight, case.bias)
    learner = Learner(case, update, state, feedback, update.new_param_state(feedback), gamma)
    rng = np.random.default_rng(3)
    for _, of_param in learner.learnt().values():
        for moment in (of_param.m, of_param.v):
            if moment is not None:
                moment.copy_(torch.from_numpy(start * rng.random(tuple(moment.shape))))
    return learner


def batches(kind: Case, count: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Tensor]]:
    """What the layer learns from: signals and inputs."""
    for seed in range(10, 10 + count):
        yield kind(SHAPE, dtype, device, seed=seed).samples


def check_same(learner: Learner, other: Learner, *names: str) -> None:
    """Compare all that two learners have learnt, or the parts named."""
    for name, wanted in other.tensors().items():
        if not names or name.split()[0] in names:
            check(name, learner.tensors()[name], to_numpy(wanted), wanted)


@pytest.mark.parametrize("rule", RULES)
def test_everything_learns_by_the_formula(
    kind: Case, rule: str, target: Target, dtype: torch.dtype
) -> None:
    """Three steps: W, b, E and all moments from one product, E from γ times it."""
    backend, device = target
    learner = make(kind, rule, dtype, device)
    start = {name: param.clone() for name, (param, _) in learner.learnt().items()}
    exact: list[tuple[golden.Array, ...]] = []
    here: list[tuple[Tensor, ...]] = []
    for samples in batches(kind, 3, dtype, device):
        case = learner.case.using(**samples)
        exact.append(tuple(case.exact()))
        here.append(tuple(case.plain()))
        learner.step(samples, backend)
    factors = {"weight": (0, 1.0), "bias": (1, 1.0), "feedback": (0, GAMMA)}
    for name, (param, state) in learner.learnt().items():
        index, factor = factors[name]
        wanted = golden.update(
            RULES[rule], to_numpy(start[name]), [factor * grads[index] for grads in exact]
        )
        by_torch, kept = plain.update(
            RULES[rule], start[name], [factor * grads[index] for grads in here]
        )
        check(name, param, wanted.param, by_torch)
        if RULES[rule].name == "sgd":
            if state.m is not None:
                check(f"{name} m", state.m, wanted.m, kept["momentum_buffer"])
            continue
        check(f"{name} m", state.m, wanted.m, kept["exp_avg"])
        check(f"{name} v", state.v, wanted.v, kept["exp_avg_sq"])
        assert state.step.item() == 3


@pytest.mark.parametrize("gamma", [1.0, -0.5])
def test_sign_and_size_of_one_step(
    kind: Case, gamma: float, target: Target, dtype: torch.dtype
) -> None:
    """E is lowered by lr · γ · scale · Σ post preᵀ: the sign of W's step, and of γ."""
    backend, device = target
    learner = make(kind, "sgd", dtype, device, gamma=gamma)
    ((samples),) = batches(kind, 1, dtype, device)
    before, start = learner.case.using(**samples).clone(), learner.feedback.clone()
    learner.step(samples, backend)
    lr = RULES["sgd"].lr
    grad, by_torch = before.exact()[0], before.plain()[0]
    check("E", learner.feedback, to_numpy(start) - lr * gamma * grad, start - lr * gamma * by_torch)


def test_the_default_factor_is_one(kind: Case, target: Target) -> None:
    """Left out, γ is 1: W and E move alike, and their difference stays (as URFB's does)."""
    backend, device = target
    learner = make(kind, "sgd", torch.float32, device)
    case, before = learner.case, learner.case.weight - learner.feedback
    case.step_op(
        **case.tensors, **case.options, update=bk.SGD(0.1), feedback=learner.feedback,
        backend=backend,
    )  # fmt: skip
    after = case.weight - learner.feedback
    check("difference", after, to_numpy(before), before)
    assert (case.weight - kind(SHAPE, device=device).weight).abs().max() > 0.1


def test_no_factor_no_change(kind: Case, target: Target, dtype: torch.dtype) -> None:
    """E8: γ = 0 leaves every bit of E as it was, while W and b learn; decay alone still acts on E."""
    backend, device = target
    learner = make(kind, "momentum", dtype, device, gamma=0.0)
    fresh = make(kind, "momentum", dtype, device)
    for samples in batches(kind, 2, dtype, device):
        learner.step(samples, backend)
    assert torch.equal(learner.feedback, fresh.feedback)
    assert not torch.equal(learner.case.weight, fresh.case.weight)
    decayed = make(kind, "sgd-decay", dtype, device, gamma=0.0)
    ((samples),) = batches(kind, 1, dtype, device)
    decayed.step(samples, backend)
    shrink = 1 - RULES["sgd-decay"].lr * RULES["sgd-decay"].weight_decay
    check("E", decayed.feedback, shrink * to_numpy(fresh.feedback), shrink * fresh.feedback)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_nobody_learns_differently_beside_an_error_kernel(
    kind: Case, rule: str, target: Target
) -> None:
    """W, b and their state learn alike whether or not E learns with them; alone, E stays."""
    backend, device = target
    learner, alone, fresh = (make(kind, rule, torch.float32, device, start=1.0) for _ in range(3))
    for samples in batches(kind, 2, torch.float32, device):
        learner.step(samples, backend)
        alone.case.using(**samples).step(alone.rule, alone.state, backend)
    check_same(learner, alone, "weight", "bias")
    assert torch.equal(alone.feedback, fresh.feedback)
    assert not torch.equal(learner.feedback, fresh.feedback)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_without_a_bias(kind: Case, rule: str, target: Target) -> None:
    """W and E learn alike whether or not there is a bias."""
    backend, device = target
    learner, other = (make(kind, rule, torch.float32, device, start=1.0) for _ in range(2))
    learner.case = learner.case.using(bias=None)
    for samples in batches(kind, 2, torch.float32, device):
        learner.step(samples, backend)
        other.step(samples, backend)
    check_same(other, learner, "feedback")
    check("weight", learner.case.weight, to_numpy(other.case.weight), other.case.weight)
    check("weight m", learner.state.weight.m, to_numpy(other.state.weight.m), other.state.weight.m)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_writing_through_any_layout(kind: Case, rule: str, layout: str, target: Target) -> None:
    """W, E and their moments in awkward memory: written where they are and nowhere else."""
    backend, device = target
    learner, straight = (make(kind, rule, torch.float32, device, start=1.0) for _ in range(2))
    laid: list[layouts.Laid] = []

    def lay(tensor: Tensor) -> Tensor:
        laid.append(layouts.laid_out(tensor, layout))
        return laid[-1].view

    learner.case = learner.case.using(weight=lay(learner.case.weight))
    learner.feedback = lay(learner.feedback)
    for state in (learner.state.weight, learner.feedback_state):
        state.m = lay(state.m)
        state.v = None if state.v is None else lay(state.v)
    for samples in batches(kind, 2, torch.float32, device):
        learner.step(samples, backend)
        straight.step(samples, backend)
    for entry in laid:
        entry.check_surroundings()
    check_same(learner, straight)


def test_what_is_written_counts_as_changed(kind: Case, target: Target) -> None:
    """Version counters move for W, b, E and their states, and for nothing that is only read."""
    backend, device = target
    learner = make(kind, "adam", torch.float32, device)
    ((samples),) = batches(kind, 1, torch.float32, device)
    read, written = list(samples.values()), list(learner.tensors().values())
    versions = [tensor._version for tensor in (*read, *written)]
    learner.step(samples, backend)
    moved = [t._version > old for t, old in zip((*read, *written), versions, strict=True)]
    assert moved == [False] * len(read) + [True] * len(written)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_compiled(kind: Case, rule: str) -> None:
    """A step with an error kernel in one graph, call after call."""
    learner, other = (make(kind, rule, torch.float32, "cpu", start=1.0) for _ in range(2))

    def step(*samples: Tensor) -> None:
        learner.step(dict(zip(names, samples, strict=True)), "reference")

    names = tuple(learner.case.samples)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for samples in batches(kind, 2, torch.float32, "cpu"):
        compiled(*samples.values())
        other.step(samples, "reference")
    torch._dynamo.reset()
    check_same(learner, other)


@pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning")
@pytest.mark.parametrize("upsample", bk.UPSAMPLINGS)
def test_compiled_network(upsample: str) -> None:
    """Errors of maps and units, and what is learnt from them, in one graph, on the default backend."""
    draw = torch.Generator().manual_seed(0)
    sizes = {
        "z": (2, 3, 6, 8), "top": (2, 5), "conv": (4, 3, 3, 3), "e_conv": (4, 3, 3, 3),
        "dense": (5, 48), "e_dense": (5, 48),
    }  # fmt: skip
    here = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    there = {name: tensor.clone() for name, tensor in here.items()}
    pool, rule = bk.MaxPool(2), bk.SGD(0.1)

    def learn(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        pooled = torch.nn.functional.max_pool2d(t["z"].tanh(), 2)
        above = torch.nn.functional.conv2d(pooled, t["conv"], padding=1)
        units = above.flatten(1)
        e = bk.ekdaa_linear_error(t["top"], t["e_dense"], units)
        maps = e.view_as(above)
        below = bk.ekdaa_conv_error(
            maps, t["e_conv"], t["z"], padding=1, pool=pool, upsample=upsample
        )
        alone = bk.ekdaa_error(pooled, t["z"], pool=pool, upsample=upsample)
        bk.dense_step(
            t["top"], units.tanh(), t["dense"], None, rule, feedback=t["e_dense"],
            feedback_scale=GAMMA,
        )  # fmt: skip
        bk.conv_step(
            maps, pooled, t["conv"], None, rule, feedback=t["e_conv"], feedback_scale=GAMMA,
            padding=1,
        )  # fmt: skip
        return e, below, alone

    torch._dynamo.reset()
    found = torch.compile(learn, fullgraph=True, backend="aot_eager")(there)
    torch._dynamo.reset()
    torch.testing.assert_close(found, learn(here))
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_number_of_threads(kind: Case, rule: str) -> None:
    """How the work is shared out must not show in what the C++ body has learnt."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            learner = make(kind, rule, torch.float32, "cpu", start=1.0)
            for samples in batches(kind, 2, torch.float32, "cpu"):
                learner.step(samples, "cpp")
            runs.append(learner.tensors())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], wanted) for name, wanted in runs[0].items())


def test_a_whole_network(target: Target) -> None:
    """E1, E10: two dense layers by the paper's equations; the old E brings e down, then E learns."""
    backend, device = target
    rng = np.random.default_rng(0)
    x, w1, w2, e2 = (rng.standard_normal(size) for size in ((6, 5), (7, 5), (4, 7), (4, 7)))
    labels, lr, beta, gamma = rng.integers(0, 4, 6), 0.1, 0.9, 0.1
    h1 = x @ w1.T
    z1 = np.tanh(h1)
    scores = np.exp(z1 @ w2.T)
    e_top = scores / scores.sum(1, keepdims=True) - np.eye(4)[labels]
    target_below = np.tanh(h1 - beta * (e_top @ e2))
    e_below = z1 - target_below
    g2 = e_top.T @ z1
    wanted = {"w1": w1 - lr * e_below.T @ x, "w2": w2 - lr * g2, "e2": e2 - lr * gamma * g2}

    t = {name: torch.from_numpy(array).float().to(device)
         for name, array in {"x": x, "w1": w1, "w2": w2, "e2": e2}.items()}  # fmt: skip
    before, after = bk.dense_forward(t["x"], t["w1"], None, backend=backend)
    classes = torch.from_numpy(labels).to(device)
    top = bk.classifier_forward(after, t["w2"], None, classes, backend=backend).error
    below = bk.ekdaa_linear_error(top, t["e2"], before, beta=beta, backend=backend)
    bk.dense_step(
        top, after, t["w2"], None, bk.SGD(lr), feedback=t["e2"], feedback_scale=gamma,
        backend=backend,
    )  # fmt: skip
    bk.dense_step(below, t["x"], t["w1"], None, bk.SGD(lr), backend=backend)
    for name, array in wanted.items():
        np.testing.assert_allclose(to_numpy(t[name]), array, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(array - {"w1": w1, "w2": w2, "e2": e2}[name]).max() > 1e-2
