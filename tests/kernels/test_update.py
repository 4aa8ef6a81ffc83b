"""Update rules on one parameter: torch.optim's results, for any shape, memory layout and dtype.

Gradients cut to a length are in `test_update_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, layouts, plain
from .cases import RULES, Rule
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

STEPS = 4


def draw(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """A parameter and a gradient for each step."""
    rng = np.random.default_rng(5)
    param, *grads = (
        torch.from_numpy(np.asarray(rng.standard_normal(size))).to(device, dtype)
        for _ in range(STEPS + 1)
    )
    return param, grads


def apply_all(
    param: Tensor, grads: list[Tensor], rule: bk.SGD | bk.Adam, backend: str
) -> bk.ParamState:
    """Apply the gradients in place; returns the state."""
    state = rule.new_param_state(param)
    for grad in grads:
        bk.apply_update(param, grad, rule, state, backend=backend)
    return state


def check_against_formula(
    rule: Rule, got: Tensor, state: bk.ParamState, start: Tensor, grads: list[Tensor]
) -> None:
    """Compare a parameter and its state with float64, judged by torch.optim's rounding."""
    exact = golden.update(rule, to_numpy(start), [to_numpy(grad) for grad in grads])
    by_torch, torch_state = plain.update(rule, start, grads)
    check("param", got, exact.param, by_torch)
    if rule.name == "sgd":
        assert state.v is state.step is None
        if rule.momentum:
            check("m", state.m, exact.m, torch_state["momentum_buffer"])
        else:
            assert state.m is None
        return
    check("m", state.m, exact.m, torch_state["exp_avg"])
    check("v", state.v, exact.v, torch_state["exp_avg_sq"])
    assert state.step.item() == len(grads)


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, target: Target, dtype: torch.dtype) -> None:
    """Every rule over several steps, on more elements than one block of any kernel."""
    backend, device = target
    param, grads = draw((3, 5, 91), dtype, device)
    start = param.clone()
    state = apply_all(param, grads, cases.library_rule(RULES[rule]), backend)
    check_against_formula(RULES[rule], param, state, start, grads)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
@pytest.mark.parametrize("size", [(), (1,), (7,), (1, 1), (4, 3, 5, 5), (2, 1, 3, 1, 2)])
def test_shapes(size: tuple[int, ...], rule: str, target: Target) -> None:
    """A single number, a vector, a convolution's weight, anything."""
    backend, device = target
    param, grads = draw(size, torch.float32, device)
    start = param.clone()
    state = apply_all(param, grads, cases.library_rule(RULES[rule]), backend)
    check_against_formula(RULES[rule], param, state, start, grads)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("size", [(0,), (3, 0), (0, 3, 3)])
def test_empty_parameter(size: tuple[int, ...], rule: str, target: Target) -> None:
    """Nothing to update is not an error, and still counts as a step."""
    backend, device = target
    param, grads = draw(size, torch.float32, device)
    state = apply_all(param, grads, cases.library_rule(RULES[rule]), backend)
    assert param.shape == size
    assert state.step is None if rule == "sgd" else state.step.item() == STEPS


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, "channels_last"])
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_layouts(rule: str, layout: str, target: Target) -> None:
    """Parameter, gradient and state in any memory layout, mixed; nothing beside them is written."""
    backend, device = target
    update = cases.library_rule(RULES[rule])
    straight, (grad, *_) = draw((2, 3, 4, 5), torch.float32, device)
    start = straight.clone()
    state = apply_all(straight, [grad], update, backend)

    def lay(tensor: Tensor) -> layouts.Laid:
        if layout != "channels_last":
            return layouts.laid_out(tensor, layout)
        copy = tensor.to(memory_format=torch.channels_last, copy=True)
        return layouts.Laid(copy, copy)

    laid = {"param": lay(start), "m": lay(torch.zeros_like(start))}
    if state.v is not None:
        laid["v"] = lay(torch.zeros_like(start))
    awkward = update.new_param_state(start)
    awkward.m, awkward.v = laid["m"].view, laid["v"].view if "v" in laid else None
    bk.apply_update(laid["param"].view, lay(grad).view, update, awkward, backend=backend)
    for name, wanted in (("param", straight), ("m", state.m), ("v", state.v)):
        if wanted is None:
            continue
        laid[name].check_surroundings()
        check(name, laid[name].view, to_numpy(wanted), wanted)


@pytest.mark.parametrize("rule", ["nesterov", "adam-decay", "adamw"])
@pytest.mark.parametrize("dtype_of_lr", [torch.float32, torch.float64])
@pytest.mark.parametrize("size_of_lr", [(), (1,)])
def test_learning_rate_as_a_tensor(
    rule: str, dtype_of_lr: torch.dtype, size_of_lr: tuple[int, ...], target: Target
) -> None:
    """One element of either precision, read anew at every call."""
    backend, device = target
    lr = torch.full(size_of_lr, 99.0, dtype=dtype_of_lr)
    update = cases.library_rule(RULES[rule], lr)
    param, grads = draw((5, 7), torch.float32, device)
    start = param.clone()
    lr.fill_(RULES[rule].lr)
    state = apply_all(param, grads, update, backend)
    assert lr.dtype == dtype_of_lr
    assert torch.equal(lr, torch.full_like(lr, RULES[rule].lr))
    check_against_formula(RULES[rule], param, state, start, grads)


@pytest.mark.parametrize("rule", ["adam-decay", "adamw", "nesterov", "sgd"])
@pytest.mark.parametrize("started", [True, False])
def test_state_of_a_torch_optimizer(rule: str, started: bool, target: Target) -> None:
    """The tensors of a torch optimizer's state can be handed over as they are, at any time."""
    backend, device = target
    param, grads = draw((6, 5), torch.float32, device)
    update = cases.library_rule(RULES[rule])
    ours, theirs = param.clone(), param.clone().requires_grad_()
    optimizer = plain.optimizer(RULES[rule], [theirs])
    state = update.new_param_state(ours)
    if started:
        theirs.grad = grads[0].clone()
        optimizer.step()
        ours.copy_(theirs.detach())
        kept = {name: value.clone() for name, value in optimizer.state[theirs].items()
                if isinstance(value, Tensor)}  # fmt: skip
        state = bk.ParamState(
            m=kept.get("exp_avg", kept.get("momentum_buffer")),
            v=kept.get("exp_avg_sq"),
            step=kept.get("step"),
        )
    for grad in grads[1:]:
        bk.apply_update(ours, grad, update, state, backend=backend)
        theirs.grad = grad.clone()
        optimizer.step()
    wanted = theirs.detach()
    check("param", ours, to_numpy(wanted), wanted)


@pytest.mark.parametrize("steps_before", [0, 9_999, 2**24 - 2])
def test_late_steps(steps_before: int, target: Target) -> None:
    """The bias correction far into training, up to the last number that float32 can count to."""
    backend, device = target
    rule = Rule("adam", betas=(0.9, 0.999), eps=1e-8)
    param, (grad, *_) = draw((4, 5), torch.float32, device)
    leaf = param.clone().requires_grad_()
    optimizer = plain.optimizer(rule, [leaf])
    moments = torch.full_like(param, 0.3), torch.full_like(param, 0.2)
    optimizer.state[leaf] = {
        "step": torch.tensor(float(steps_before)),
        "exp_avg": moments[0].clone(),
        "exp_avg_sq": moments[1].clone(),
    }
    leaf.grad = grad.clone()
    optimizer.step()
    state = bk.ParamState(*moments, torch.tensor(float(steps_before)))
    bk.apply_update(param, grad, cases.library_rule(rule), state, backend=backend)
    assert state.step.item() == steps_before + 1
    check("param", param, to_numpy(leaf), leaf.detach())


def test_adam_at_rest(target: Target) -> None:
    """A zero gradient and no memory move nothing: 0 / (0 + eps), not NaN."""
    backend, device = target
    param, _ = draw((4, 5), torch.float32, device)
    start = param.clone()
    apply_all(param, [torch.zeros_like(param)], bk.Adam(lr=1.0), backend)
    assert torch.equal(param, start)


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_learning_rate_only_remembers(rule: str, target: Target) -> None:
    """lr = 0 moves no parameter, but the moments and the step count go on."""
    backend, device = target
    param, grads = draw((4, 5), torch.float32, device)
    start = param.clone()
    state = apply_all(param, grads, cases.library_rule(RULES[rule], 0.0), backend)
    assert torch.equal(param, start)
    assert state.m is None or torch.count_nonzero(state.m) == param.numel()


def test_not_a_number_in_the_gradient(target: Target) -> None:
    """A NaN reaches its own element and no other."""
    backend, device = target
    for rule in ("momentum", "adamw"):
        param, (grad, *_) = draw((4, 5), torch.float32, device)
        grad[2, 3] = float("nan")
        apply_all(param, [grad], cases.library_rule(RULES[rule]), backend)
        assert torch.isnan(param[2, 3])
        assert torch.isnan(param).sum() == 1


@pytest.mark.parametrize("scale", [1.0, -0.25, 3.0, 0.0])
@pytest.mark.parametrize("rule", RULES)
def test_scales(rule: str, scale: float, target: Target, dtype: torch.dtype) -> None:
    """A factor of the gradient, not of what the rule makes of it: decay is not scaled."""
    backend, device = target
    param, grads = draw((3, 7), dtype, device)
    start, update = param.clone(), cases.library_rule(RULES[rule])
    state = update.new_param_state(param)
    for grad in grads:
        bk.apply_update(param, grad, update, state, scale=scale, backend=backend)
    scaled = [scale * grad for grad in grads]
    exact = golden.update(RULES[rule], to_numpy(start), [scale * to_numpy(g) for g in grads])
    check("param", param, exact.param, plain.update(RULES[rule], start, scaled)[0])


Mutation = Callable[[golden.Array, list[golden.Array]], golden.Array]


def _other(**changes: Any) -> Mutation:
    def wrong(param: golden.Array, grads: list[golden.Array]) -> golden.Array:
        return golden.update(Rule(**changes), param, grads).param

    return wrong


def _velocity_holds_lr(param: golden.Array, grads: list[golden.Array]) -> golden.Array:
    rate, velocity = 0.05, np.zeros_like(param)
    for grad in grads:
        velocity, rate = 0.9 * velocity + rate * grad, rate / 2  # a schedule shows the difference
        param = param - velocity
    return param


WRONG: dict[str, tuple[str, Mutation]] = {
    "flipped sign": ("sgd", lambda p, g: golden.update(RULES["sgd"], p, [-x for x in g]).param),
    "no momentum": ("momentum", _other(name="sgd")),
    "Nesterov": ("momentum", _other(name="sgd", momentum=0.9, nesterov=True)),
    "lr in the velocity": ("momentum", _velocity_holds_lr),
    "no decay": ("sgd-decay", _other(name="sgd")),
    "decay of Adam for AdamW": ("adamw", _other(name="adam", weight_decay=0.1)),
    "decay of AdamW for Adam": ("adam-decay", _other(name="adamw", weight_decay=0.1)),
    "betas swapped": ("adam", _other(name="adam", betas=(0.95, 0.8))),
    "no bias correction": (
        "adam", lambda p, g: golden.update(RULES["adam"], p, [0 * x for x in g] * 99 + g).param
    ),
    "one step too few": ("adam", lambda p, g: golden.update(RULES["adam"], p, g[:-1]).param),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_are_rejected(wrong: str) -> None:
    """The comparison above has teeth: the usual slips in an optimizer fail it."""
    name, formula = WRONG[wrong]
    param, grads = draw((4, 5), torch.float32, "cpu")
    right = golden.update(RULES[name], to_numpy(param), [to_numpy(g) for g in grads]).param
    near_miss = formula(to_numpy(param), [to_numpy(g) for g in grads])
    by_torch, _ = plain.update(RULES[name], param, grads)
    check("param", torch.from_numpy(right).float(), right, by_torch)
    with pytest.raises(AssertionError, match="param"):
        check("param", torch.from_numpy(near_miss).float(), right, by_torch)
