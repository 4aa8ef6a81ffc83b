"""Every op as torch sees it: schemas, fakes, tracing, version counters, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases
from .cases import FAMILIES, LayerCase, classifier_case, dense_case, drtp_case, pepita_case
from .samples_ekdaa import CONV, EKDAA
from .samples_elementwise import ELEMENTWISE
from .samples_invertible import INVERSE, INVERTIBLE_CONV
from .samples_local_conv import DIFFERENTIABLE, LOCAL_CONV

pytestmark = [
    pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


UPDATE = ("optimizer", "lr", "beta1", "beta2", "eps", "weight_decay", "nesterov", "lr_tensor")


def _arguments(op: Any, case: LayerCase, named: dict[str, Any]) -> tuple[Any, ...]:
    """What an op gets, in its schema's order: a case's tensors and options, and what is named."""
    options = dict(case.options)
    if "slope" in options:
        options["slope"] = cases.default_slope(options["activation"], options["slope"])
    if "margin" in options:
        hinge = cases.default_hinge(len(case.weight), *options.values())
        options |= zip(("margin", "off_class"), hinge, strict=True)
    given = {**case.tensors, **options, **named}
    if "z" in given and given["feedback"] is not None:
        given["feedback"] = given["feedback"].t().contiguous()  # [classes, in] is the op's own form
    return tuple(given[argument.name] for argument in op.default._schema.arguments)


def step_arguments(
    op: Any, case: LayerCase, rule: bk.SGD | bk.Adam, *, beside: bool = False
) -> tuple[Any, ...]:
    """What a ``*_step`` op gets; with a weight that learns `beside` the layer's own, if it takes one."""
    named = dict(zip(UPDATE, rule.args(), strict=True))
    states = vars(rule.new_state(case.weight, case.bias))
    if case.step_op is bk.dense_step:
        feedback = 2 * case.weight if beside else None
        kept = rule.new_param_state(feedback) if beside else bk.ParamState()
        states |= {"feedback": kept}
        named |= {"feedback": feedback, "feedback_scale": 0.5}
    for name, state in states.items():
        named |= {f"{name}_{field}": tensor for field, tensor in vars(state).items()}
    return _arguments(op, case, named)


def grad_arguments(op: Any, case: LayerCase, accumulate: bool) -> tuple[Any, ...]:
    """What a ``*_grad`` op gets."""
    bias = None if case.bias is None else torch.ones_like(case.bias)
    named = {"grad_weight": torch.ones_like(case.weight), "grad_bias": bias}
    return _arguments(op, case, {**named, "accumulate": accumulate})


def _layer_samples(family: Callable[..., LayerCase], name: str) -> list[tuple[Any, ...]]:
    op = getattr(torch.ops.bpfree, name)
    if name.endswith("grad"):
        return [grad_arguments(op, family(), False), grad_arguments(op, family(bias=False), True)]
    rate = torch.tensor(0.1)
    return [
        step_arguments(op, family(), bk.SGD(0.1)),
        step_arguments(
            op, family(bias=False), bk.SGD(rate, momentum=0.9, nesterov=True), beside=True
        ),
        step_arguments(op, family(dtype=torch.float64), bk.AdamW(rate), beside=True),
    ]


def _pepita_samples(name: str) -> list[tuple[Any, ...]]:
    def later(**options: Any) -> LayerCase:
        return pepita_case(feedback=False, mask=False, activation="hardtanh", **options)

    return [*_layer_samples(pepita_case, name), *_layer_samples(later, name)[:1]]


def _forward_samples() -> list[tuple[Any, ...]]:
    t = drtp_case(dtype=torch.float64).tensors
    return [
        (t["x"], t["weight"], t["bias"], "tanh", 0.0),
        (t["x"], t["weight"], None, "hardtanh", 0.5),
        (t["x"][:0], t["weight"], None, "relu", 0.0),
    ]


def _classifier_samples() -> list[tuple[Any, ...]]:
    x, weight, bias, labels = classifier_case().tensors.values()
    return [
        (x, weight, bias, labels, "ce", 0.0, 0.0),
        (x, weight, bias, labels, "hinge", 1.0, 0.2),
        (x[:0], weight, None, labels[:0].int(), "mse", 0.0, 0.0),
    ]


SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "drtp_linear_step": lambda: _layer_samples(drtp_case, "drtp_linear_step"),
    "drtp_linear_grad": lambda: _layer_samples(drtp_case, "drtp_linear_grad"),
    "classifier_forward": _classifier_samples,
    "classifier_step": lambda: _layer_samples(classifier_case, "classifier_step"),
    "classifier_grad": lambda: _layer_samples(classifier_case, "classifier_grad"),
    "dense_forward": _forward_samples,
    "dense_step": lambda: _layer_samples(dense_case, "dense_step"),
    "dense_grad": lambda: _layer_samples(dense_case, "dense_grad"),
    "pepita_linear_step": lambda: _pepita_samples("pepita_linear_step"),
    "pepita_linear_grad": lambda: _pepita_samples("pepita_linear_grad"),
    **ELEMENTWISE,
    **LOCAL_CONV,
    **CONV,
    **EKDAA,
    **INVERSE,
    **INVERTIBLE_CONV,
    **DIFFERENTIABLE,
}
"""Arguments for each registered op. An op that is missing here fails `test_every_op_is_tested`."""


def _registered() -> set[str]:
    prefix = "bpfree::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def test_every_op_is_tested() -> None:
    """A new op needs samples here; every op has bodies, or is made of ops that have."""
    assert _registered() == set(SAMPLES)
    assert set(backends.ops()) == set(SAMPLES) - set(DIFFERENTIABLE)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, fake, autograd registration and tracing, as torch wants them."""
    op = getattr(torch.ops.bpfree, name).default
    for arguments in SAMPLES[name]():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_fakes_match(name: str) -> None:
    """The fake function's shapes, dtypes and strides are those of the real outputs."""
    op = getattr(torch.ops.bpfree, name).default
    for arguments in SAMPLES[name]():
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        results = [r if isinstance(r, tuple) else (r,) for r in (op(*arguments), op(*on_meta))]
        for real, fake in zip(*results, strict=True):
            if real is None:
                assert fake is None
                continue
            assert (real.shape, real.dtype, real.stride()) == (
                fake.shape, fake.dtype, fake.stride()
            )  # fmt: skip


def _training_step(family: Any, rule: bk.SGD | bk.Adam) -> tuple[Any, Any, list[Tensor]]:
    case = family()
    state = rule.new_state(case.weight, case.bias)
    tensors = [case.weight, case.bias]
    tensors += [t for s in (state.weight, state.bias) for t in (s.m, s.v, s.step) if t is not None]

    names = tuple(case.samples)  # not looked at in a graph, which would depend on what they hold

    def run(*samples: Tensor) -> Any:
        return case.using(**dict(zip(names, samples, strict=True))).step(rule, state)

    return case, run, tensors


RULES = {
    "sgd": lambda: bk.SGD(0.1),
    "nesterov": lambda: bk.SGD(torch.tensor(0.1), momentum=0.9, nesterov=True),
    "adamw": lambda: bk.AdamW(0.1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_step(family: str, rule: str) -> None:
    """A step in one graph: outputs, parameters and state equal eager's, call after call."""
    case, eager, wanted = _training_step(FAMILIES[family], RULES[rule]())
    _, step, got = _training_step(FAMILIES[family], RULES[rule]())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    first, *others = case.samples.values()
    for sign in (1, -2):
        torch.testing.assert_close(compiled(sign * first, *others), eager(sign * first, *others))
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(case.weight, FAMILIES[family]().weight)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_gradient(family: str, accumulate: bool) -> None:
    """Gradients in one graph, made there or given."""
    case = FAMILIES[family]()
    given = {}
    if accumulate:
        given = {f"grad_{name}": torch.ones_like(case.tensors[name]) for name in ("weight", "bias")}
    wanted = case.grad(**{k: t.clone() for k, t in given.items()}, accumulate=accumulate)
    compiled = torch.compile(case.grad, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, accumulate=accumulate), wanted)
    for name, tensor in given.items():
        assert torch.equal(tensor, wanted[-2 if name == "grad_weight" else -1])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled_signal_and_update(backend: str | None) -> None:
    """A convolution that learns, in one graph: the map's signal, then its gradient applied."""

    def learn(x: Tensor, weight: Tensor, feedback: Tensor, labels: Tensor) -> Tensor:
        z = F.conv2d(x, weight)
        y, post = bk.drtp_signal(z, feedback, labels, backend=backend)
        grad = torch.nn.grad.conv2d_weight(x, weight.shape, post)
        bk.apply_update(weight, grad, bk.SGD(0.1), backend=backend)
        return y

    x, weight, feedback = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, 3)
    labels, other = torch.tensor([1, 0]), weight.clone()
    wanted = learn(x, weight, feedback, labels)
    compiled = torch.compile(learn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, other, feedback, labels), wanted)
    torch.testing.assert_close(other, weight)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled_second_pass(backend: str | None) -> None:
    """PEPITA in one graph: forward, error, second pass, learning, in layers and on a map."""

    def learn(t: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        z, h = bk.dense_forward(t["x"], t["w1"], None, activation="relu", backend=backend)
        outputs = bk.classifier_forward(h, t["w2"], None, labels, backend=backend)
        change = bk.pepita_linear_step(
            z, t["x"], outputs.error, t["w1"], None, bk.SGD(0.1), feedback=t["f"], backend=backend
        )
        bk.dense_step(
            outputs.error, h + change, t["w2"], None, bk.SGD(0.1), scale=1 / 5, backend=backend
        )
        mixed = bk.pepita_difference(z, outputs.error, basis=t["f"].t() @ t["w1"].t())
        return outputs.loss, mixed

    draw = torch.Generator().manual_seed(0)
    sizes = {"x": (5, 7), "w1": (6, 7), "w2": (3, 6), "f": (7, 3)}
    tensors = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    others = {name: tensor.clone() for name, tensor in tensors.items()}
    labels = torch.tensor([2, 0, 1, 1, 2])
    wanted = learn(tensors, labels)
    compiled = torch.compile(learn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(others, labels), wanted)
    torch.testing.assert_close(others, tensors)


def test_compiled_by_inductor() -> None:
    """A step and what stands around it, through the default compiler."""
    case, eager, wanted = _training_step(drtp_case, bk.SGD(0.1, momentum=0.9))
    _, step, got = _training_step(drtp_case, bk.SGD(0.1, momentum=0.9))
    compiled = torch.compile(lambda x, labels: step(x * 2, labels)[0] + 1, fullgraph=True)
    x, labels = case.tensors["x"], case.tensors["labels"]
    torch.testing.assert_close(compiled(x, labels), eager(x * 2, labels)[0] + 1)
    torch.testing.assert_close(got, wanted)


def test_one_graph_for_every_batch_and_learning_rate() -> None:
    """A smaller last batch and a schedule (of a tensor) compile nothing anew."""
    rate = torch.tensor(0.1)
    _, eager, wanted = _training_step(classifier_case, bk.SGD(rate))
    _, step, got = _training_step(classifier_case, bk.SGD(rate))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (5, 9, 12):
        inputs = classifier_case((batch, 7, 6, 3)).tensors
        x, labels = inputs["x"], inputs["labels"]
        torch.testing.assert_close(compiled(x, labels), eager(x, labels))
        rate.mul_(0.5)
        compilations.append(counter.frame_count)
    torch.testing.assert_close(got, wanted)
    assert compilations[0] == compilations[-1] > 0


def test_compiled_labels_that_are_no_class() -> None:
    """A graph cannot check labels; one out of range then selects a zero row, as on a GPU."""
    case = drtp_case()
    case.tensors["labels"][:] = torch.tensor([1, -1, 3, 2**40, -(2**40)])
    compiled = torch.compile(case.grad, fullgraph=True, backend="aot_eager")
    case.check(compiled())
    with pytest.raises(IndexError, match=r"labels.*-1 at position 1"):
        case.grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_count_as_changed(family: str, target: tuple[str, str]) -> None:
    """Version counters move for what is written, by any backend, and for nothing else."""
    backend, device = target
    case = FAMILIES[family](device=device)
    rule = bk.Adam(0.1)
    state = rule.new_state(case.weight, case.bias)
    written = [case.weight, case.bias, *vars(state.weight).values(), *vars(state.bias).values()]
    read = [t for name, t in case.tensors.items() if name not in ("weight", "bias")]
    before = [[tensor._version for tensor in tensors] for tensors in (written, read)]
    case.step(rule, state, backend)
    after = [[tensor._version for tensor in tensors] for tensors in (written, read)]
    assert all(new > old for new, old in zip(after[0], before[0], strict=True))
    assert after[1] == before[1]

    buffers = torch.zeros_like(case.weight), torch.zeros_like(case.bias)
    versions = case.weight._version, case.bias._version
    case.grad(backend, grad_weight=buffers[0], grad_bias=buffers[1])
    assert all(buffer._version > 0 for buffer in buffers)
    assert (case.weight._version, case.bias._version) == versions


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_that_saved_the_old_weight_says_so(compiled: bool) -> None:
    """Backward through a weight that has learnt since is an error, not a wrong gradient."""
    case = drtp_case()
    weight, x = nn.Parameter(case.weight), case.tensors["x"].clone().requires_grad_()
    case = case.using(weight=weight)
    y = F.linear(x, weight)

    def learn() -> None:
        case.step_op(*case.tensors.values(), bk.SGD(0.1))

    if compiled:
        learn = torch.compile(learn, fullgraph=True, backend="aot_eager")
    learn()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_that_require_gradients(family: str, target: tuple[str, str]) -> None:
    """An ordinary module's parameters are taken as they are, and no graph is made."""
    backend, device = target
    case = FAMILIES[family](device=device)
    weight, bias = nn.Parameter(case.weight.clone()), nn.Parameter(case.bias.clone())
    inputs = case.tensors[case.input].clone().requires_grad_()
    trained = case.using(weight=weight, bias=bias, **{case.input: inputs})
    plain_rule = bk.SGD(0.1, momentum=0.9)
    state = plain_rule.new_state(weight, bias)
    results = [*trained.grad(backend), *trained.step(plain_rule, state, backend)]
    for tensor in (*results, state.weight.m, state.bias.m):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    for parameter in (weight, bias, inputs):
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not torch.equal(weight, case.weight)


def test_gradients_into_the_grad_of_a_parameter(target: tuple[str, str]) -> None:
    """Accumulating into ``.grad`` is what any torch optimizer then steps with."""
    backend, device = target
    case = drtp_case(device=device)
    weight, bias = nn.Parameter(case.weight), nn.Parameter(case.bias)
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    layer = case.using(weight=weight, bias=bias)
    layer.grad(backend, grad_weight=weight.grad, grad_bias=bias.grad, accumulate=True)
    fresh = case.grad(backend)
    torch.testing.assert_close(weight.grad, fresh[-2] + 1)
    torch.testing.assert_close(bias.grad, fresh[-1] + 1)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode: Any, target: tuple[str, str]) -> None:
    """Learning works in every grad mode, on parameters that were made outside of it."""
    backend, device = target
    case = drtp_case(device=device)
    before = case.clone()
    with mode():
        outputs = case.step(bk.SGD(0.1), backend=backend)
    before.check(outputs)
    assert not torch.equal(case.weight, before.weight)
