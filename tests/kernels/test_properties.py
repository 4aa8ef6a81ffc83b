"""Properties that hold for every input: found by searching for a counterexample.

In float64 where the backend has it, so that rounding cannot hide a slip.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, plain
from .cases import FAMILIES, RULES, LayerCase
from .tolerances import check, to_numpy

Target = tuple[str, str]

search = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # a red test stays red until somebody mends it
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
SEEDS = st.integers(0, 2**16)


def exact_dtype(target: Target) -> torch.dtype:
    """The widest dtype of a backend."""
    widest = {"triton": torch.float32}.get(target[0], torch.float64)
    return torch.float32 if target[1] == "cuda" else widest


def draw(family: str, sizes: tuple[int, int, int, int], seed: int, target: Target) -> LayerCase:
    """A layer on the target, in its widest dtype."""
    return FAMILIES[family](sizes, exact_dtype(target), target[1], seed=seed)


def size_of_terms(case: LayerCase) -> float:
    """A bound on the sum of magnitudes that a gradient adds up: its rounding scales with it."""
    read = [t for name, t in case.tensors.items() if name not in ("weight", "bias", "labels")]
    size = float(case.tensors[case.input].shape[0])
    for tensor in read:
        size *= float(tensor.abs().max() + 1)
    return size


def check_equal(name: str, got: Tensor, wanted: Tensor, scale: float) -> None:
    """Equal up to a few roundings at the given scale."""
    check(name, got, to_numpy(wanted), wanted, scale=scale)


def permuted(case: LayerCase, seed: int) -> tuple[LayerCase, Tensor]:
    """The same layer with its batch in another order, and the order."""
    batch = case.tensors[case.input].shape[0]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(batch))
    order = order.to(case.weight.device)
    return case.using(**{name: tensor[order] for name, tensor in case.samples.items()}), order


@pytest.mark.parametrize("family", FAMILIES)
@given(sizes=SIZES, seed=SEEDS)
@search
def test_order_of_the_batch(family: str, target: Target, sizes: Any, seed: int) -> None:
    """Another order of the samples: the outputs in that order, the same gradients and update."""
    case = draw(family, sizes, seed, target)
    other, order = permuted(case, seed)
    scale = size_of_terms(case)
    outputs = len(case.exact()) - 2
    for index, (got, wanted) in enumerate(
        zip(other.grad(target[0]), case.grad(target[0]), strict=True)
    ):
        check_equal(f"result {index}", got, wanted[order] if index < outputs else wanted, scale)
    rule = bk.SGD(lr=0.5)
    straight, shuffled = case.clone(), other.clone()
    straight.step(rule, backend=target[0])
    shuffled.step(rule, backend=target[0])
    check_equal("weight", shuffled.weight, straight.weight, scale)
    check_equal("bias", shuffled.bias, straight.bias, scale)


@given(sizes=SIZES, seed=SEEDS, factors=st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
@search
def test_linear_in_the_feedback(
    target: Target, sizes: Any, seed: int, factors: tuple[int, int]
) -> None:
    """The gradients of a·B₁ + b·B₂ are a and b times those of B₁ and B₂; the output ignores B."""
    case = draw("drtp", sizes, seed, target)
    first = case.tensors["feedback"]
    second = draw("drtp", sizes, seed + 1, target).tensors["feedback"]
    a, b = factors
    of_first, of_second, of_both = (
        case.using(feedback=feedback).grad(target[0])
        for feedback in (first, second, a * first + b * second)
    )
    assert torch.equal(of_both[0], of_first[0])
    for index in (1, 2):
        wanted = a * of_first[index] + b * of_second[index]
        check_equal(f"gradient {index}", of_both[index], wanted, 8 * size_of_terms(case))


@pytest.mark.parametrize("family", ["dense", "pepita"])
@given(sizes=SIZES, seed=SEEDS, factors=st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
@search
def test_linear_in_the_presynaptic_factor(
    family: str, target: Target, sizes: Any, seed: int, factors: tuple[int, int]
) -> None:
    """∂W of a·pre₁ + b·pre₂ is a and b times those of pre₁ and pre₂; nothing else depends on pre."""
    case = draw(family, sizes, seed, target)
    first = case.tensors["pre"]
    second = draw(family, sizes, seed + 1, target).tensors["pre"]
    a, b = factors
    of_first, of_second, of_both = (
        case.using(pre=pre).grad(target[0]) for pre in (first, second, a * first + b * second)
    )
    wanted = a * of_first[-2] + b * of_second[-2]
    check_equal("gradient", of_both[-2], wanted, 8 * size_of_terms(case))
    for got, same in zip((*of_both[:-2], of_both[-1]), (*of_first[:-2], of_first[-1]), strict=True):
        assert torch.equal(got, same)


@given(sizes=SIZES, seed=SEEDS, power=st.integers(-9, 9), flip=st.booleans())
@search
def test_homogeneous_in_the_error(
    target: Target, sizes: Any, seed: int, power: int, flip: bool
) -> None:
    """PEPITA through the identity: twice the error (by a power of two) is exactly twice all else."""
    backend, device = target
    case = cases.pepita_case(sizes, exact_dtype(target), device, activation="identity", seed=seed)
    factor = 2.0**power * (-1 if flip else 1)
    scaled = case.using(change=factor * case.tensors["change"])
    for got, once in zip(scaled.grad(backend), case.grad(backend), strict=True):
        assert torch.equal(got, factor * once)


@given(sizes=SIZES, seed=SEEDS, share=st.floats(0, 1))
@search
def test_accumulating_parts_of_a_batch(target: Target, sizes: Any, seed: int, share: float) -> None:
    """DRTP sums over the batch, so a batch in two parts, accumulated, is the whole batch."""
    case = draw("drtp", sizes, seed, target)
    batch = sizes[0]
    cut = min(max(1, round(share * batch)), batch)
    whole = case.grad(target[0])
    buffers = {
        "grad_weight": torch.zeros_like(case.weight),
        "grad_bias": torch.zeros_like(case.bias),
    }
    for part in (slice(0, cut), slice(cut, batch)):
        samples = {name: case.tensors[name][part] for name in ("x", "labels")}
        if samples["labels"].numel():
            case.using(**samples).grad(target[0], accumulate=True, **buffers)
    for (name, got), wanted in zip(buffers.items(), whole[-2:], strict=True):
        check_equal(name, got, wanted, size_of_terms(case))


@pytest.mark.parametrize("family", FAMILIES)
@given(sizes=SIZES, seed=SEEDS, rule=st.sampled_from(["sgd", "momentum", "nesterov", "sgd-decay"]))
@search
def test_any_shape_and_rule(family: str, target: Target, sizes: Any, seed: int, rule: str) -> None:
    """Outputs, gradients and a step at sizes that nobody chose (Adam's step: see `test_layer`)."""
    case = draw(family, sizes, seed, target)
    scale, exact, by_torch = size_of_terms(case), case.exact(), case.plain()
    start = case.clone()
    results = [*case.grad(target[0])]
    update = cases.library_rule(RULES[rule])
    results += case.step(update, update.new_state(case.weight, case.bias), target[0])
    for index, got in enumerate(results):
        wanted = index % len(exact)
        check(f"result {index}", got, exact[wanted], by_torch[wanted], scale=scale)
    for name, index in (("weight", -2), ("bias", -1)):
        old = start.tensors[name]
        updated = golden.update(RULES[rule], to_numpy(old), [exact[index]]).param
        reference, _ = plain.update(RULES[rule], old, [by_torch[index]])
        check(name, case.tensors[name], updated, reference, scale=scale)


@given(
    sizes=st.lists(st.integers(0, 9), max_size=4), seed=SEEDS, rule=st.sampled_from(sorted(RULES))
)
@search
def test_an_update_is_elementwise(target: Target, sizes: list[int], seed: int, rule: str) -> None:
    """A tensor's shape does not matter: each element is updated as if it were alone."""
    backend, device = target
    rng = np.random.default_rng(seed)
    param, grad = (
        torch.from_numpy(np.asarray(rng.standard_normal(sizes))).to(device, exact_dtype(target))
        for _ in range(2)
    )
    flat, flat_grad = param.clone().view(-1), grad.clone().view(-1)
    update = cases.library_rule(RULES[rule])
    bk.apply_update(param, grad, update, update.new_param_state(param), backend=backend)
    for part in (slice(0, flat.numel() // 2), slice(flat.numel() // 2, None)):
        state = update.new_param_state(flat[part])
        bk.apply_update(flat[part], flat_grad[part], update, state, backend=backend)
    check_equal("param", param.view(-1), flat, 4.0)
