"""Locally connected layers in Triton: every way through the tiles, both orders of maps, half precision.

Small enough for the interpreter; on a GPU `test_local_conv` and its neighbours test these kernels, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bpfree_kernels import SGD, Adam, backends
from bpfree_kernels.geometry import geometry, output_size
from bpfree_kernels.reference import local_conv as reference
from bpfree_kernels.triton import local_conv
from bpfree_kernels.update import UpdateRule

from .test_triton_bodies import HALF, RULES, error, random, step_args

STATUS = backends.status("triton")
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)

ORDERS = {"first": torch.contiguous_format, "last": torch.channels_last}


class Shape(NamedTuple):
    """A layer's sizes and where its windows lie."""

    batch: int
    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


SHAPES = {
    "colours": Shape(5, 3, (3, 4), 20, (3, 3), padding=(1, 1)),
    "one-of-all": Shape(1, 1, (1, 1), 1, (1, 1)),
    "groups": Shape(3, 6, (3, 4), 9, (2, 3), padding=(0, 1), groups=3),
    "strides": Shape(4, 2, (5, 6), 3, (3, 2), stride=(2, 3), padding=(1, 1)),
    "dilations": Shape(4, 2, (4, 3), 3, (3, 2), padding=(1, 2), dilation=(2, 3)),
    "all-at-once": Shape(2, 4, (5, 5), 4, (2, 2), (2, 2), (1, 1), (2, 3), 2),
    "blocks-of-samples": Shape(129, 2, (2, 3), 3, (2, 2)),
    "blocks-of-units": Shape(2, 66, (1, 3), 70, (1, 2)),
}
"""Small layers that between them reach every loop, border and partly filled tile."""

UNEVEN = SHAPES["all-at-once"]


class Layer(NamedTuple):
    """Tensors of a layer, its geometry in schema order, and the size of its maps."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    signal: Tensor
    geometry: tuple[int, ...]

    def double(self) -> Layer:
        """The same numbers in float64."""
        return Layer(*(tensor.double() for tensor in self[:4]), self.geometry)


def make(shape: Shape, order: str = "first", dtype: torch.dtype = torch.float32) -> Layer:
    places = shape.stride, shape.padding, shape.dilation
    rows, columns = output_size(shape.size, shape.kernel, *places)
    per_group = shape.channels // shape.groups
    weight = random(rows, columns, *shape.kernel, per_group, shape.outputs)
    weight /= max(1, per_group * math.prod(shape.kernel)) ** 0.5
    maps = random(shape.batch, shape.channels, *shape.size, seed=1)
    signal = random(shape.batch, shape.outputs, rows, columns, seed=2)
    memory = ORDERS[order]
    return Layer(
        maps.to(dtype, memory_format=memory),
        weight.to(dtype),
        random(rows, columns, shape.outputs, dtype=dtype),
        signal.to(dtype, memory_format=memory),
        geometry(shape.kernel, *places, shape.groups),
    )


def connections(weight: Tensor, seed: int) -> Tensor:
    return random(*weight.shape, seed=seed) > 0


def passes(body: Any, layer: Layer) -> list[Tensor]:
    """z, f(z) and the feedback of a layer below whose field is its x."""
    x, weight, bias, signal, place = layer
    size = x.shape[2:]
    change = body.local_conv_feedback(signal, weight, x, "tanh", 0.0, *size, *place)
    return [*body.local_conv_forward(x, weight, bias, "tanh", 0.0, *place), change]


def step(body: Any, layer: Layer, rule: UpdateRule, *, masks: bool, feedback: bool) -> list[Tensor]:
    """Weight, bias and feedback after a step, then everything that the rule remembers."""
    x, weight, bias, signal, place = layer
    weight, bias = weight.clone(), bias.clone()
    args = step_args(rule, weight, bias)
    learns, state = (
        (weight.flip(0).clone(), rule.new_param_state(weight)) if feedback else (None, None)
    )
    where = [connections(weight, s) if masks else None for s in (3, 4)]
    if state is None:
        where[1] = None
    of_feedback = (None, None, None) if state is None else (state.m, state.v, state.step)
    body.local_conv_step(
        signal, x, weight, bias, learns, *where, 0.5, *place, *args, *of_feedback
    )  # fmt: skip
    tensors = (weight, bias, learns, *args[8:], *of_feedback)
    return [tensor for tensor in tensors if tensor is not None]


def assert_close(got: list[Tensor], wanted: list[Tensor], bound: float = 1e-6) -> None:
    errors = [error(*pair) for pair in zip(got, wanted, strict=True)]
    assert max(errors) < bound, errors


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_passes(shape: Shape, order: str) -> None:
    """Against the reference in float64; results lie in memory as the maps they were made from."""
    layer = make(shape, order)
    got, wanted = passes(local_conv, layer), passes(reference, layer.double())
    assert_close(got, wanted)
    assert [t.stride() for t in got] == [t.stride() for t in wanted]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_learning(shape: Shape, order: str) -> None:
    """Weight, bias, feedback and momenta, each where its mask says so."""
    layer, rule = make(shape, order), SGD(0.1, 0.9)
    got = step(local_conv, layer, rule, masks=True, feedback=True)
    assert_close(got, step(reference, layer.double(), rule, masks=True, feedback=True))


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules(rule: UpdateRule, masks: bool, feedback: bool) -> None:
    layer = make(UNEVEN)
    got = step(local_conv, layer, rule, masks=masks, feedback=feedback)
    # Adam divides by a root of what may be tiny: rounding grows there.
    bound = 1e-5 if isinstance(rule, Adam) else 1e-6
    assert_close(got, step(reference, layer.double(), rule, masks=masks, feedback=feedback), bound)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_changes_where_no_connection_is(rule: UpdateRule) -> None:
    """Bit for bit, weights and what the rule remembers of them, even of a gradient that is NaN."""
    layer = make(UNEVEN)
    layer.signal[0, 0] = torch.nan
    weight, bias = layer.weight.clone(), layer.bias.clone()
    feedback, state = weight.clone(), rule.new_param_state(weight)
    args = step_args(rule, weight, bias)
    masks = connections(weight, 3), connections(weight, 4)
    local_conv.local_conv_step(
        layer.signal, layer.x, weight, bias, feedback, *masks, 0.5, *layer.geometry, *args,
        state.m, state.v, state.step,
    )  # fmt: skip
    for mask, param, kept in (
        (masks[0], weight, args[8:10]),
        (masks[1], feedback, (state.m, state.v)),
    ):
        assert torch.equal(param[~mask], layer.weight[~mask])
        assert all((memory[~mask] == 0).all() for memory in kept if memory is not None)
        assert (param[mask] != layer.weight[mask]).any()


@pytest.mark.parametrize("batch", [0, 3, 129])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients(batch: int, masked: bool, accumulate: bool) -> None:
    """Stored over NaN or added to what is there; of an empty batch they are zero."""
    layer = make(UNEVEN._replace(batch=batch))
    mask = connections(layer.weight, 3) if masked else None
    results = []
    for body, (x, weight, bias, signal, place) in (
        (local_conv, layer),
        (reference, layer.double()),
    ):
        grads = [t.clone() if accumulate else torch.full_like(t, torch.nan) for t in (weight, bias)]
        body.local_conv_grad(signal, x, mask, 0.5, *place, *grads, accumulate)
        results.append(grads)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_bias_or_activation() -> None:
    x, weight, _, signal, place = make(UNEVEN)
    got = local_conv.local_conv_forward(x, weight, None, "identity", 0.0, *place)
    wide = reference.local_conv_forward(x.double(), weight.double(), None, "identity", 0.0, *place)
    assert error(got[0], wide[0]) < 1e-6
    assert got[1].numel() == wide[1].numel() == 0
    size = x.shape[2:]
    change = local_conv.local_conv_feedback(signal, weight, None, "tanh", 0.0, *size, *place)
    exact = reference.local_conv_feedback(
        signal.double(), weight.double(), None, "tanh", 0.0, *size, *place
    )
    assert error(change, exact) < 1e-6
    grad, wanted = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.float64)
    local_conv.local_conv_grad(signal, x, None, 1.0, *place, grad, None, False)
    reference.local_conv_grad(signal.double(), x.double(), None, 1.0, *place, wanted, None, False)
    assert error(grad, wanted) < 1e-6


def test_an_empty_batch_has_empty_maps() -> None:
    got = passes(local_conv, make(UNEVEN._replace(batch=0)))
    wanted = passes(reference, make(UNEVEN._replace(batch=0)))
    assert [t.shape for t in got] == [t.shape for t in wanted]


def test_without_inputs_the_bias_still_learns() -> None:
    layer = make(UNEVEN._replace(channels=0))
    got = step(local_conv, layer, SGD(0.1), masks=False, feedback=False)
    wanted = step(reference, layer.double(), SGD(0.1), masks=False, feedback=False)
    assert error(got[1], wanted[1]) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_outside_a_map_is_read(order: str) -> None:
    """Maps between NaNs in memory: a window that left its map would bring them in."""
    plain = make(UNEVEN, order)
    among = []
    for maps in (plain.x, plain.signal):
        buffer = maps.new_full((maps.numel() + 256,), torch.nan)
        among.append(buffer.as_strided(maps.shape, maps.stride(), 128).copy_(maps))
    layer = plain._replace(x=among[0], signal=among[1])
    for got, wanted in zip(passes(local_conv, layer), passes(local_conv, plain), strict=True):
        assert torch.equal(got, wanted)
    results = [step(local_conv, x, SGD(0.1), masks=False, feedback=True) for x in (layer, plain)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_accumulates_in_float32(half: torch.dtype, order: str) -> None:
    """Against float64 from the same numbers: roundings of the results, none of the sums."""
    layer, rule = make(SHAPES["colours"], order, half), SGD(0.1, 0.9)
    bound = 2 * torch.finfo(half).eps
    got, wanted = passes(local_conv, layer), passes(reference, layer.double())
    assert {tensor.dtype for tensor in got} == {half}
    assert_close(got, wanted, bound)
    got = step(local_conv, layer, rule, masks=True, feedback=True)
    assert_close(got, step(reference, layer.double(), rule, masks=True, feedback=True), bound)
