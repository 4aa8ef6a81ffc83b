"""What every family of layers has in common: in-place steps, gradients, layouts, odd sizes.

The families' own formulas are in `test_drtp`, `test_classifier`, `test_dense`, `test_pepita`,
`test_local_conv` and `test_conv`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, layouts, plain
from .cases import FAMILIES, RULES, LayerCase, Rule
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")

STEPS = 3

TRAINED = (9, 70, 29, 4)
"""The shape for training: whole vectors and a rest, whole blocks and a rest, in every kernel."""

TRAINED_MAPS = (9, 19, 29, 4)
"""The same for layers whose weight has as many values again for each element of a window."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    """The function that makes a case of each family."""
    return FAMILIES[request.param]


def batches(family: Any, dtype: torch.dtype, device: str) -> list[LayerCase]:
    """One layer with as many different batches as there are steps."""
    on_maps = family in (cases.conv_case, cases.local_conv_case)
    shape = TRAINED_MAPS if on_maps else TRAINED
    first = family(shape, dtype, device)
    return [first.using(**family(shape, dtype, device, seed=seed).samples) for seed in range(STEPS)]


def train(
    layer: list[LayerCase], rule: bk.SGD | bk.Adam, backend: str
) -> tuple[LayerCase, bk.LayerState, list[tuple[Tensor, ...]]]:
    """Step through the batches; returns the trained layer, its state and each step's outputs."""
    trained = layer[0].clone()
    state = rule.new_state(trained.weight, trained.bias)
    outputs = [trained.using(**batch.samples).step(rule, state, backend) for batch in layer]
    return trained, state, outputs


def exact_training(layer: list[LayerCase], rule: Rule) -> tuple[golden.Updated, golden.Updated]:
    """The same training in float64: weight and bias with their memory."""
    params = [to_numpy(layer[0].weight), to_numpy(layer[0].bias)]
    grads: list[list[golden.Array]] = [[], []]
    current = [golden.update(rule, param, []) for param in params]
    for batch in layer:
        weight, bias = (torch.from_numpy(updated.param) for updated in current)
        exact = batch.using(weight=weight, bias=bias).exact()
        for history, grad in zip(grads, exact[-2:], strict=True):
            history.append(grad)
        current = [golden.update(rule, p, g) for p, g in zip(params, grads, strict=True)]
    return current[0], current[1]


def torch_training(
    layer: list[LayerCase], rule: Rule, gradients: Any
) -> tuple[LayerCase, torch.optim.Optimizer]:
    """The same training by torch.optim, with the gradients that ``gradients(case)`` ends with."""
    trained = layer[0].clone()
    params = [trained.weight, trained.bias]
    optimizer = plain.optimizer(rule, params)
    for batch in layer:
        here = trained.using(**batch.samples)
        params[0].grad, params[1].grad = gradients(here)[-2:]
        optimizer.step()
    return trained, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_steps_follow_the_formula(
    family: Any, rule: str, target: Target, dtype: torch.dtype
) -> None:
    """Parameters and state after several steps, against float64 and torch.optim."""
    backend, device = target
    layer = batches(family, dtype, device)
    trained, state, _ = train(layer, cases.library_rule(RULES[rule]), backend)
    by_torch, optimizer = torch_training(layer, RULES[rule], LayerCase.plain)
    for name, exact in zip(("weight", "bias"), exact_training(layer, RULES[rule]), strict=True):
        param, of_param = trained.tensors[name], getattr(state, name)
        torch_state = optimizer.state[by_torch.tensors[name]]
        check(name, param, exact.param, by_torch.tensors[name])
        if RULES[rule].name != "sgd":
            check(f"{name} m", of_param.m, exact.m, torch_state["exp_avg"])
            check(f"{name} v", of_param.v, exact.v, torch_state["exp_avg_sq"])
            assert of_param.step.item() == torch_state["step"].item() == STEPS
        elif RULES[rule].momentum:
            check(f"{name} m", of_param.m, exact.m, torch_state["momentum_buffer"])
        else:
            assert of_param == bk.ParamState()


@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adam-decay", "adamw"])
def test_step_equals_gradient_and_torch_optim(family: Any, rule: str, target: Target) -> None:
    """A step is its twin's gradient given to torch.optim."""
    backend, device = target
    layer = batches(family, torch.float32, device)
    trained, _, _ = train(layer, cases.library_rule(RULES[rule]), backend)
    twin, _ = torch_training(layer, RULES[rule], lambda case: case.grad(backend))
    for name in ("weight", "bias"):
        expected = twin.tensors[name]
        check(name, trained.tensors[name], to_numpy(expected), expected)


def test_step_returns_the_output_of_the_old_weight(
    family: Any, target: Target, dtype: torch.dtype
) -> None:
    """The step's outputs are those of the weight before it, and those of its twin."""
    backend, device = target
    case = family(dtype=dtype, device=device)
    before = case.clone()
    outputs = case.step(bk.SGD(lr=1.0), backend=backend)
    before.check(outputs)
    assert not torch.equal(case.weight, before.weight)
    for got, wanted in zip(outputs, before.grad(backend), strict=False):
        check("output", got, to_numpy(wanted), wanted)


@pytest.mark.parametrize("where", ["float32", "float64", "device"])
@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_learning_rate_as_a_tensor(rule: str, where: str, target: Target) -> None:
    """The kernel reads the tensor at every call, so a schedule that writes to it is followed."""
    backend, device = target
    dtype = torch.float64 if where == "float64" else torch.float32
    lr = torch.tensor([0.5], dtype=dtype, device=device if where == "device" else "cpu")
    by_tensor = cases.drtp_case(device=device)
    by_number = by_tensor.clone()
    tensor_rule = cases.library_rule(RULES[rule], lr)
    tensor_state = tensor_rule.new_state(by_tensor.weight, by_tensor.bias)
    number_state = tensor_rule.new_state(by_number.weight, by_number.bias)
    for value in (0.25, 0.125):
        lr.fill_(value)
        by_tensor.step(tensor_rule, tensor_state, backend)
        by_number.step(cases.library_rule(RULES[rule], value), number_state, backend)
        for name in ("weight", "bias"):
            wanted = by_number.tensors[name]
            check(name, by_tensor.tensors[name], to_numpy(wanted), wanted)
    assert lr.item() == 0.125


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_go_where_they_are_wanted(
    family: Any, accumulate: bool, target: Target, dtype: torch.dtype
) -> None:
    """Given buffers are returned, overwritten (whatever is in them) or added to."""
    backend, device = target
    case = family(dtype=dtype, device=device)
    fresh = case.grad(backend)
    start = 2.0 if accumulate else float("nan")
    grad_weight, grad_bias = (torch.full_like(t, start) for t in (case.weight, case.bias))
    given = case.grad(backend, grad_weight=grad_weight, grad_bias=grad_bias, accumulate=accumulate)
    assert given[-2] is grad_weight
    assert given[-1] is grad_bias
    for got, once, exact in zip(given[-2:], fresh[-2:], case.exact()[-2:], strict=True):
        offset = start if accumulate else 0.0
        check("gradient", got, exact + offset, once + offset)


def test_gradient_buffers_one_by_one(family: Any, target: Target) -> None:
    """One buffer given and the other made."""
    backend, device = target
    case = family(device=device)
    for name, index in (("grad_weight", -2), ("grad_bias", -1)):
        buffer = torch.full_like(case.tensors[name.removeprefix("grad_")], float("nan"))
        results = case.grad(backend, **{name: buffer})
        assert results[index] is buffer
        case.check(results)


def test_without_bias(family: Any, target: Target, dtype: torch.dtype) -> None:
    """No bias: outputs, gradient and step of the weight alone; a bias's state is not read."""
    backend, device = target
    case = family(dtype=dtype, device=device, bias=False)
    results = case.grad(backend)
    case.check(results)
    rule = bk.Adam(lr=0.05)
    wrong_bias_state = bk.ParamState(m=torch.zeros(99), step=torch.zeros(()))
    state = bk.LayerState(rule.new_param_state(case.weight), wrong_bias_state)
    before = case.clone()
    before.check(case.step(rule, state, backend))
    assert state.weight.step.item() == 1
    assert torch.equal(wrong_bias_state.m, torch.zeros(99))
    assert wrong_bias_state.step.item() == 0
    assert not torch.equal(before.weight, case.weight)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_inputs_in_any_layout(family: Any, layout: str, target: Target) -> None:
    """Everything that is read may lie in memory in any way."""
    backend, device = target
    case = family((6, 10, 9, 4), device=device)
    awkward = case.using(
        **{name: layouts.laid_out(tensor, layout).view for name, tensor in case.tensors.items()}
    )
    snapshot = cases.Snapshot(awkward.tensors)
    case.check(awkward.grad(backend))
    snapshot.check_unchanged()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adam"])
def test_writing_through_any_layout(family: Any, rule: str, layout: str, target: Target) -> None:
    """Parameters and state are written through their views, and nothing beside them is."""
    backend, device = target
    case = family((6, 10, 9, 4), device=device)
    update = cases.library_rule(RULES[rule])
    straight = case.clone()
    state = update.new_state(straight.weight, straight.bias)
    straight.step(update, state, backend)

    laid = {name: layouts.laid_out(case.tensors[name], layout) for name in ("weight", "bias")}
    awkward = case.using(**{name: entry.view for name, entry in laid.items()})
    awkward_state = update.new_state(case.weight, case.bias)
    for name in ("weight", "bias"):
        of_param = getattr(awkward_state, name)
        for field in ("m", "v"):
            if getattr(of_param, field) is not None:
                laid[f"{name}.{field}"] = layouts.laid_out(getattr(of_param, field), layout)
                setattr(of_param, field, laid[f"{name}.{field}"].view)
    awkward.step(update, awkward_state, backend)
    for name, entry in laid.items():
        entry.check_surroundings()
        param, _, field = name.partition(".")
        of_param = getattr(state, param)
        wanted = getattr(of_param, field) if field else straight.tensors[param]
        check(name, entry.view, to_numpy(wanted), wanted)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_through_any_layout(
    family: Any, layout: str, accumulate: bool, target: Target
) -> None:
    """Given gradient buffers may lie in memory in any way."""
    backend, device = target
    case = family((6, 10, 9, 4), device=device)
    names = {"grad_weight": case.weight, "grad_bias": case.bias}
    laid = {name: layouts.laid_out(torch.ones_like(t), layout) for name, t in names.items()}
    views = {name: entry.view for name, entry in laid.items()}
    case.grad(backend, accumulate=accumulate, **views)
    for (name, entry), exact, by_torch in zip(
        laid.items(), case.exact()[-2:], case.plain()[-2:], strict=True
    ):
        entry.check_surroundings()
        check(name, entry.view, exact + accumulate, by_torch + accumulate)


def test_expanded_inputs(family: Any, target: Target) -> None:
    """One sample, expanded to a batch without memory of its own, is a batch of equal samples."""
    backend, device = target
    case = family(device=device)
    one = {name: tensor[:1] for name, tensor in case.samples.items()}
    batch = case.tensors[case.input].shape[0]
    repeated = case.using(**{name: t.expand(batch, *t.shape[1:]) for name, t in one.items()})
    case.using(**{name: t.repeat(batch, *[1] * (t.dim() - 1)) for name, t in one.items()}).check(
        repeated.grad(backend)
    )


def test_inputs_may_share_memory_with_each_other(family: Any, target: Target) -> None:
    """Only what is written must be by itself: without a step, the input may even be of the weight."""
    backend, device = target
    case = family((9, 9, 9, 3), device=device)
    inputs = case.tensors[case.input]
    shared = case.using(**{case.input: case.weight.view(-1)[: inputs.numel()].view_as(inputs)})
    shared.check(shared.grad(backend))


@pytest.mark.parametrize("empty", [(4, 0, 3, 2), (1, 0, 2, 1)])
def test_no_inputs(family: Any, empty: tuple[int, ...], target: Target) -> None:
    """A layer without inputs is its bias: legal in torch, legal here.

    Its bias learns unless nothing about it can change, as in PEPITA.
    """
    backend, device = target
    case = family(empty, device=device)
    case.check(case.grad(backend))
    before = case.clone()
    rule = bk.Adam(lr=0.05)
    before.check(case.step(rule, rule.new_state(case.weight, case.bias), backend))
    assert torch.equal(before.bias, case.bias) == (not case.exact()[-1].any())


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("labelled", ["drtp", "classifier"])
def test_label_dtypes(labelled: str, labels_dtype: torch.dtype, target: Target) -> None:
    """Both integer types of labels, with a class that comes twice and one that is missing (D5)."""
    backend, device = target
    case = FAMILIES[labelled](device=device)
    labels = torch.tensor([2, 0, 2, 2, 0], dtype=labels_dtype, device=device)
    case = case.using(labels=labels)
    case.check(case.grad(backend))
    before = case.clone()
    before.check(case.step(bk.SGD(lr=0.1), backend=backend))
    for param, grad, old in zip(
        (case.weight, case.bias), before.exact()[-2:], (before.weight, before.bias), strict=True
    ):
        check("stepped", param, to_numpy(old) - 0.1 * grad, param)
