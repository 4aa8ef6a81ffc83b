"""Locally connected layers that learn: two weights from one product, each with a mask of its own.

U2, U7 and U9 of the golden checks of URFB; the steps of a layer without feedback are in `test_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from . import golden_local_conv as exact
from .cases import RULES
from .local_layers import LAYERS, Drawn, arrays, draw
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("poisoned")]

LAYER = LAYERS["everything"]
SCALE = 1 / 3


@dataclass
class Learner:
    """A layer with feedback, masks and all that its rule remembers."""

    t: Drawn
    rule: bk.SGD | bk.Adam
    state: bk.LayerState
    feedback: Tensor
    feedback_state: bk.ParamState
    weight_mask: Tensor | None = None
    feedback_mask: Tensor | None = None

    def step(self, signal: Tensor, x: Tensor, backend: str) -> None:
        """Learn, W, b and R."""
        bk.local_conv_step(
            signal, x, self.t.weight, self.t.bias, self.rule, self.state,
            feedback=self.feedback, feedback_state=self.feedback_state,
            weight_mask=self.weight_mask, feedback_mask=self.feedback_mask, scale=SCALE,
            **LAYER.place, backend=backend,
        )  # fmt: skip

    def learnt(self) -> dict[str, tuple[Tensor, bk.ParamState, Tensor | None]]:
        """What learns, by name: the parameter, its state and its mask."""
        return {
            "weight": (self.t.weight, self.state.weight, self.weight_mask),
            "bias": (self.t.bias, self.state.bias, None),
            "feedback": (self.feedback, self.feedback_state, self.feedback_mask),
        }


def make(
    rule: str, dtype: torch.dtype, device: str, *, masks: bool = False, start: float = 0.0
) -> Learner:
    """A learner whose momenta (and squares of them) start as `start` times a number in [0, 1)."""
    t = draw(LAYER, dtype, device)
    update = cases.library_rule(RULES[rule])
    feedback = draw(LAYER, dtype, device, seed=1).weight
    rng = np.random.default_rng(3)
    learner = Learner(
        t, update, update.new_state(t.weight, t.bias), feedback, update.new_param_state(feedback)
    )
    for _, state, _ in learner.learnt().values():
        for moment in (state.m, state.v):
            if moment is not None:
                moment.copy_(torch.from_numpy(start * rng.random(tuple(moment.shape))))
    if masks:
        drawn = [torch.from_numpy(rng.random(tuple(feedback.shape)) < 0.5) for _ in range(2)]
        learner.weight_mask, learner.feedback_mask = (mask.to(device) for mask in drawn)
    return learner


def batches(count: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Signals and inputs."""
    for seed in range(10, 10 + count):
        t = draw(LAYER, dtype, device, seed=seed)
        yield t.signal, t.x


def chosen(name: str, got: Tensor, wanted: golden.Array, by_torch: Tensor, where: Tensor) -> None:
    """Compare the entries that a mask keeps."""
    check(name, got[where], wanted[where.cpu().numpy()], by_torch[where])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_everything_learns_by_the_formula(
    rule: str, masks: bool, target: Target, dtype: torch.dtype
) -> None:
    """Three steps: W, b, R and all moments, from one product; W and R each where it has connections."""
    backend, device = target
    learner = make(rule, dtype, device, masks=masks)
    start = {name: param.clone() for name, (param, _, _) in learner.learnt().items()}
    of_weight: list[golden.Array] = []
    of_bias: list[golden.Array] = []
    of_weight_here: list[Tensor] = []
    of_bias_here: list[Tensor] = []
    for signal, x in batches(3, dtype, device):
        weight, bias = learner.t.weight, learner.t.bias
        grads = exact.gradients(*arrays(signal, x, weight, bias), SCALE, *LAYER.where)
        here = plain.local_conv_gradients(signal, x, weight, bias, SCALE, *LAYER.where)
        of_weight.append(grads[0])
        of_bias.append(grads[1])
        of_weight_here.append(here.grad_weight)
        of_bias_here.append(here.grad_bias)
        learner.step(signal, x, backend)
    for name, (param, state, mask) in learner.learnt().items():
        grads, here = (of_bias, of_bias_here) if name == "bias" else (of_weight, of_weight_here)
        wanted = golden.update(RULES[rule], to_numpy(start[name]), grads)
        by_torch, kept = plain.update(RULES[rule], start[name], here)
        where = torch.ones_like(param, dtype=torch.bool) if mask is None else mask
        chosen(name, param, wanted.param, by_torch, where)
        assert torch.equal(param[~where], start[name][~where])
        if RULES[rule].name == "sgd":
            if state.m is not None:
                chosen(f"{name} m", state.m, wanted.m, kept["momentum_buffer"], where)
            continue
        chosen(f"{name} m", state.m, wanted.m, kept["exp_avg"], where)
        chosen(f"{name} v", state.v, wanted.v, kept["exp_avg_sq"], where)
        assert state.step.item() == 3


@pytest.mark.parametrize("rule", RULES)
def test_what_a_mask_excludes_never_changes(rule: str, target: Target, dtype: torch.dtype) -> None:
    """U7: not a bit of it nor of its moments, by decay or momentum either, whatever its value."""
    backend, device = target
    learner = make(rule, dtype, device, masks=True, start=1.0)
    learner.t.weight[:, :, 0] = 0.0  # of both kinds: no weight is known by its value
    learner.feedback[:, :, 1] = 0.0
    before = [
        [
            (name, tensor, tensor.clone())
            for tensor in (param, state.m, state.v)
            if tensor is not None
        ]
        for name, (param, state, _) in learner.learnt().items()
    ]
    for signal, x in batches(2, dtype, device):
        learner.step(signal, x, backend)
    for entries, (_, _, mask) in zip(before, learner.learnt().values(), strict=True):
        for name, tensor, old in entries:
            where = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
            assert torch.equal(tensor[~where], old[~where]), name
            assert (tensor[where] != old[where]).float().mean() > 0.5, name


def test_a_live_weight_that_hits_zero_learns_on(target: Target, dtype: torch.dtype) -> None:
    """U7: a step to exactly 0 leaves a weight alive, with masks and without."""
    backend, device = target
    for masked in (False, True):
        ones = torch.ones(1, 1, 1, 1, dtype=dtype, device=device)
        weight = torch.ones(1, 1, 1, 1, 1, 1, dtype=dtype, device=device)
        feedback = weight.clone()
        mask = torch.ones_like(weight, dtype=torch.bool) if masked else None
        passed = []
        for signal in (ones, -2 * ones):
            bk.local_conv_step(
                signal, ones, weight, None, bk.SGD(1.0), feedback=feedback, weight_mask=mask,
                feedback_mask=mask, backend=backend,
            )  # fmt: skip
            passed += [weight.item(), feedback.item()]
        assert passed == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_difference_of_weight_and_feedback_is_constant(
    masked: bool, rule: str, target: Target
) -> None:
    """U2: over 100 steps, without decay, where both learn or neither does."""
    backend, device = target
    learner = make(rule, torch.float32, device, masks=masked)
    learner.feedback_mask = learner.weight_mask
    before = learner.t.weight - learner.feedback
    start = learner.t.weight.clone()
    steps = list(batches(5, torch.float32, device))
    for step in range(100):
        signal, x = steps[step % 5]
        learner.step((-1) ** (step // 7) * signal, x, backend)
    moved = (learner.t.weight - start).abs().max()
    assert moved > 0.1
    assert (learner.t.weight - learner.feedback - before).abs().max() <= 1e-6 * max(1, moved)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_nobody_learns_differently_beside_feedback(rule: str, target: Target) -> None:
    """U9: W, b and their state learn alike whether or not R learns with them; alone, R stays."""
    backend, device = target
    learner, alone = (make(rule, torch.float32, device) for _ in range(2))
    for signal, x in batches(2, torch.float32, device):
        learner.step(signal, x, backend)
        bk.local_conv_step(
            signal, x, alone.t.weight, alone.t.bias, alone.rule, alone.state, scale=SCALE,
            **LAYER.place, backend=backend,
        )  # fmt: skip
    for name in ("weight", "bias"):
        (got, state, _), (wanted, wanted_state, _) = (
            whose.learnt()[name] for whose in (learner, alone)
        )
        check(name, got, to_numpy(wanted), wanted)
        for moment, kept in vars(state).items():
            expected = getattr(wanted_state, moment)
            assert (kept is None) == (expected is None)
            if kept is not None:
                check(f"{name} {moment}", kept, to_numpy(expected), expected)
    fresh = make(rule, torch.float32, device)
    assert torch.equal(alone.feedback, fresh.feedback)
    assert not torch.equal(learner.feedback, fresh.feedback)


Masks = Callable[[Tensor], Tensor | None]

KEEP: dict[str, tuple[Masks, bool]] = {
    "nothing": (lambda weight: torch.zeros_like(weight, dtype=torch.bool), False),
    "everything": (lambda weight: torch.ones_like(weight, dtype=torch.bool), True),
    "without a mask": (lambda _: None, True),
}
"""Masks, and whether anything learns with them."""


@pytest.mark.parametrize("kept_of_feedback", KEEP)
@pytest.mark.parametrize("kept_of_weight", KEEP)
def test_masks_are_independent(kept_of_weight: str, kept_of_feedback: str, target: Target) -> None:
    """Nothing, everything or no mask at all, for W and R by themselves; the bias learns in any case."""
    backend, device = target
    learner, free = (make("sgd", torch.float32, device) for _ in range(2))
    start = make("sgd", torch.float32, device)
    masks = [KEEP[kept][0](learner.feedback) for kept in (kept_of_weight, kept_of_feedback)]
    learner.weight_mask, learner.feedback_mask = masks
    ((signal, x),) = batches(1, torch.float32, device)
    learner.step(signal, x, backend)
    free.step(signal, x, backend)
    for name, kept in (("weight", kept_of_weight), ("feedback", kept_of_feedback)):
        got, unchanged = learner.learnt()[name][0], start.learnt()[name][0]
        wanted = free.learnt()[name][0] if KEEP[kept][1] else unchanged
        check(name, got, to_numpy(wanted), wanted)
        assert torch.equal(got, unchanged) == (not KEEP[kept][1])
    check("bias", learner.t.bias, to_numpy(free.t.bias), free.t.bias)
    assert not torch.equal(learner.t.bias, start.t.bias)


def test_gradient_of_a_masked_layer(target: Target, dtype: torch.dtype) -> None:
    """0 where the mask is False, even where it is added; elsewhere the formula's."""
    backend, device = target
    t = draw(LAYER, dtype, device)
    mask = draw(LAYER, dtype, device, seed=1).weight > 0
    wanted = exact.gradients(*arrays(t.signal, t.x, t.weight, t.bias), 1.0, *LAYER.where)
    by_torch = plain.local_conv_gradients(t.signal, t.x, t.weight, t.bias, 1.0, *LAYER.where)
    grads = bk.local_conv_grad(
        t.signal, t.x, t.weight, t.bias, mask=mask, **LAYER.place, backend=backend
    )
    check("weight", grads[0], wanted[0] * mask.cpu().numpy(), by_torch[0] * mask)
    check("bias", grads[1], wanted[1], by_torch[1])
    assert torch.count_nonzero(grads[0][~mask]) == 0
    added = torch.full_like(t.weight, 2)
    bk.local_conv_grad(
        t.signal, t.x, t.weight, mask=mask, grad_weight=added, accumulate=True, **LAYER.place,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(added[~mask], torch.full_like(added[~mask], 2))
    chosen("added", added, wanted[0] + 2, by_torch[0] + 2, mask)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_writing_feedback_through_any_layout(layout: str, target: Target) -> None:
    """R, its state and the masks in awkward memory: written where they are and nowhere else."""
    backend, device = target
    learner, straight = (
        make("adamw", torch.float32, device, masks=True, start=1.0) for _ in range(2)
    )
    laid = {
        "feedback": layouts.laid_out(learner.feedback, layout),
        "m": layouts.laid_out(learner.feedback_state.m, layout),
        "v": layouts.laid_out(learner.feedback_state.v, layout),
    }
    learner.feedback = laid["feedback"].view
    learner.feedback_state.m, learner.feedback_state.v = laid["m"].view, laid["v"].view
    for mask in ("weight_mask", "feedback_mask"):
        setattr(learner, mask, layouts.laid_out(getattr(learner, mask), layout).view)
    masks = cases.Snapshot({"w": learner.weight_mask, "r": learner.feedback_mask})
    for signal, x in batches(2, torch.float32, device):
        learner.step(signal.contiguous(memory_format=torch.channels_last), x, backend)
        straight.step(signal, x, backend)
    for entry in laid.values():
        entry.check_surroundings()
    masks.check_unchanged()
    for name, (param, state, _) in straight.learnt().items():
        got, got_state, _ = learner.learnt()[name]
        for what, value, wanted in (
            (name, got, param), (f"{name} m", got_state.m, state.m), (f"{name} v", got_state.v, state.v)
        ):  # fmt: skip
            check(what, value, to_numpy(wanted), wanted)


def test_written_feedback_counts_as_changed(target: Target) -> None:
    """Version counters move for R and its state, and for nothing that is only read."""
    backend, device = target
    learner = make("adam", torch.float32, device, masks=True)
    ((signal, x),) = batches(1, torch.float32, device)
    read = [signal, x, learner.weight_mask, learner.feedback_mask]
    written = [learner.feedback, *vars(learner.feedback_state).values()]
    versions = [tensor._version for tensor in (*read, *written)]
    learner.step(signal, x, backend)
    changed = [t._version > old for t, old in zip((*read, *written), versions, strict=True)]
    assert changed == [False] * 4 + [True] * 4


def test_one_mask_may_serve_both(target: Target) -> None:
    """Only what is written must be by itself: W and R may share a mask."""
    backend, device = target
    learner, other = (make("sgd", torch.float32, device, masks=True) for _ in range(2))
    learner.feedback_mask = learner.weight_mask
    other = replace(other, feedback_mask=other.weight_mask.clone())
    ((signal, x),) = batches(1, torch.float32, device)
    learner.step(signal, x, backend)
    other.step(signal, x, backend)
    assert torch.equal(learner.feedback, other.feedback)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_number_of_threads(rule: str, order: torch.memory_format) -> None:
    """How the work is shared out must not show in what the C++ body has learnt."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            learner = make(rule, torch.float32, "cpu", masks=True)
            for signal, x in batches(2, torch.float32, "cpu"):
                learner.step(signal, x.contiguous(memory_format=order), "cpp")
            runs.append([param for param, _, _ in learner.learnt().values()])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(run, runs[0], strict=True))


WRONG: dict[str, Callable[[golden.Array, golden.Array], tuple[golden.Array, golden.Array]]] = {
    "flipped sign": lambda dw, db: (-dw, -db),
    "mean over the batch": lambda dw, db: (dw / 3, db / 3),
    "flipped window": lambda dw, db: (dw[:, :, ::-1, ::-1], db),
    "rows in another order": lambda dw, db: (np.roll(dw, 1, 0), np.roll(db, 1, 0)),
    "tied": lambda dw, db: (np.zeros_like(dw) + dw.mean((0, 1)), db),
    "groups mixed up": lambda dw, db: (np.roll(dw, 3, 5), db),
    "unscaled bias": lambda dw, db: (dw, db / SCALE),
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparisons above have teeth: near misses of the formula fail them in every dtype."""
    t = draw(LAYER, precision, "cpu")
    right = exact.gradients(*arrays(t.signal, t.x, t.weight, t.bias), SCALE, *LAYER.where)
    here = plain.local_conv_gradients(t.signal, t.x, t.weight, t.bias, SCALE, *LAYER.where)

    def compare(results: tuple[golden.Array, ...]) -> None:
        for name, got, wanted, by_torch in zip("wb", results, right, here, strict=True):
            check(name, torch.from_numpy(got.copy()).to(precision), wanted, by_torch)

    compare(right)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(WRONG[wrong](*right))
