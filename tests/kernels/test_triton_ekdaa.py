"""EKDAA and convolutions in Triton: every way through the tiles, orders of maps, poolings, half precision.

Small enough for the interpreter; the formulas are tested for every backend alike in `test_ekdaa`,
`test_conv`, `test_dense` and `test_update`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bpfree_kernels import SGD, Adam, backends
from bpfree_kernels.activations import ACTIVATIONS
from bpfree_kernels.geometry import MaxPool, geometry, output_size
from bpfree_kernels.reference import conv as reference_conv
from bpfree_kernels.reference import dense as reference_dense
from bpfree_kernels.reference import ekdaa as reference
from bpfree_kernels.reference import update as reference_update
from bpfree_kernels.triton import conv, dense, ekdaa, update
from bpfree_kernels.update import UpdateRule

from .test_triton_bodies import DEVICE, HALF, RULES, error, random, step_args
from .test_triton_local_conv import ORDERS, SHAPES, Shape, assert_close

STATUS = backends.status("triton")
pytestmark = [
    pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned"),
]

UNEVEN = SHAPES["all-at-once"]

POOLS = {
    "none": MaxPool(1),
    "halves": MaxPool(2),
    "gaps": MaxPool(2, stride=3),
    "holes": MaxPool(2, stride=3, dilation=2),
    "borders": MaxPool((2, 3), padding=1, ceil_mode=True),
    "overlap": MaxPool(3, stride=2, padding=1),
    "overlap-dilated": MaxPool((3, 2), stride=(1, 2), dilation=2),
}
"""Windows side by side, apart, over the edge, and over each other."""

UNPOOLED = (9, 8)
"""A map of which most of these poolings leave some units out."""


class Layer(NamedTuple):
    """Maps below a convolution, what comes down to it, E, and both geometries in schema order."""

    z: Tensor
    change: Tensor
    error: Tensor
    feedback: Tensor
    place: tuple[int, ...]
    pool: MaxPool

    def double(self) -> Layer:
        """The same numbers in float64."""
        return Layer(*(tensor.double() for tensor in self[:4]), *self[4:])


def make(
    shape: Shape, pool: MaxPool = POOLS["none"], orders: str = "first-first",
    dtype: torch.dtype = torch.float32,
) -> Layer:  # fmt: skip
    """A convolution of a shape's sizes, its input pooled from maps of the shape's size."""
    of_z, of_error = (ORDERS[order] for order in orders.split("-"))
    places = shape.stride, shape.padding, shape.dilation
    entered = pool.size(shape.size)
    above = output_size(entered, shape.kernel, *places)
    per_group = shape.channels // shape.groups
    feedback = random(shape.outputs, per_group, *shape.kernel)
    feedback /= max(1, per_group * math.prod(shape.kernel)) ** 0.5
    error_maps = random(shape.batch, shape.outputs, *above, seed=2)
    return Layer(
        random(shape.batch, shape.channels, *shape.size, seed=1).to(dtype, memory_format=of_z),
        random(shape.batch, shape.channels, *entered, seed=3).to(dtype, memory_format=of_error),
        error_maps.to(dtype, memory_format=of_error),
        feedback.to(dtype),
        geometry(shape.kernel, *places, shape.groups),
        pool,
    )


def errors(
    body: Any, layer: Layer, upsample: str = "argmax", activation: str = "tanh"
) -> list[Tensor]:
    """e of the maps below from d, and from the error above."""
    z, change, above, feedback, place, pool = layer
    of_below = (upsample, *pool.windows(), activation, 0.3)
    size = change.shape[2:]
    return [
        body.ekdaa_error(change, z, 0.9, *of_below),
        body.ekdaa_conv_error(above, feedback, z, 0.9, *place, *size, *of_below),
    ]


@pytest.mark.parametrize("orders", ["first-first", "last-last", "first-last", "last-first"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_errors(shape: Shape, orders: str) -> None:
    """Against the reference in float64; the results lie in memory as z."""
    layer = make(shape, orders=orders)
    got, wanted = errors(ekdaa, layer), errors(reference, layer.double())
    assert_close(got, wanted, 2e-6)
    assert [t.stride() for t in got] == [t.stride() for t in wanted]


@pytest.mark.parametrize("upsample", ["argmax", "nearest", "average"])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_up_sampling(pool: MaxPool, upsample: str) -> None:
    """Every unit is written, those that no window holds with 0."""
    for orders in ("first-last", "last-first"):
        layer = make(UNEVEN._replace(size=UNPOOLED), pool, orders)
        got, wanted = errors(ekdaa, layer, upsample), errors(reference, layer.double(), upsample)
        assert_close(got, wanted)
        untouched = wanted[0] == 0
        assert (got[0][untouched] == 0).all()
        assert (got[1][untouched] == 0).all()


@pytest.mark.parametrize("pool", ["halves", "overlap"])
def test_the_first_of_equals_wins_and_nan_before_all(pool: str) -> None:
    layer = make(UNEVEN._replace(size=UNPOOLED), POOLS[pool])
    layer.z.copy_(layer.z.round())
    assert_close(errors(ekdaa, layer, "argmax"), errors(reference, layer.double(), "argmax"))
    layer.z[:, :, ::3, ::2] = torch.nan
    got, wanted = errors(ekdaa, layer, "argmax"), errors(reference, layer.double(), "argmax")
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer = make(UNEVEN._replace(size=UNPOOLED), POOLS["halves"])
    got = errors(ekdaa, layer, activation=activation)
    assert_close(got, errors(reference, layer.double(), activation=activation))


@pytest.mark.parametrize("batch", [0, 1, 70])
@pytest.mark.parametrize("units", [1, 33, 130])
def test_dense_errors(batch: int, units: int) -> None:
    above, feedback, z = random(batch, 5), random(5, units), random(batch, units, seed=1)
    got = ekdaa.ekdaa_linear_error(above, feedback, z, 0.9, "tanh", 0.0)
    wide = (above.double(), feedback.double(), z.double())
    wanted = reference.ekdaa_linear_error(*wide, 0.9, "tanh", 0.0)
    assert got.shape == wanted.shape
    assert batch == 0 or error(got, wanted) < 1e-6


def test_empty_maps_have_no_error() -> None:
    layer = make(UNEVEN._replace(batch=0, size=UNPOOLED), POOLS["overlap"])
    assert [t.shape for t in errors(ekdaa, layer)] == [layer.z.shape] * 2


def learn(
    body: Any, layer: Layer, rule: UpdateRule, *, scale: float = 0.5, feedback: bool = True
) -> list[Tensor]:
    """Weight, bias and feedback after a step of a convolution whose input is `z`, then all state."""
    x, _, signal, weight, place, _ = layer
    weight, bias = weight.clone(), random(weight.shape[0], dtype=weight.dtype)
    learns = weight.flip(0).clone() if feedback else None
    args = step_args(rule, weight, bias)
    kept = vars(rule.new_param_state(weight)).values() if feedback else (None, None, None)
    body.conv_step(signal, x, weight, bias, learns, scale, 0.1, *place, *args, *kept)
    return [tensor for tensor in (weight, bias, learns, *args[8:], *kept) if tensor is not None]


@pytest.mark.parametrize("orders", ["first-first", "last-last", "first-last", "last-first"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_learning(shape: Shape, orders: str) -> None:
    layer = make(shape, orders=orders)
    got, wanted = (
        learn(conv, layer, SGD(0.1, 0.9)),
        learn(reference_conv, layer.double(), SGD(0.1, 0.9)),
    )
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules(rule: UpdateRule, feedback: bool) -> None:
    layer = make(UNEVEN)
    got = learn(conv, layer, rule, feedback=feedback)
    wanted = learn(reference_conv, layer.double(), rule, feedback=feedback)
    # Adam divides by a root of what may be tiny: rounding grows there.
    assert_close(got, wanted, 1e-5 if isinstance(rule, Adam) else 1e-6)


@pytest.mark.parametrize("batch", [0, 3, 129])
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients(batch: int, accumulate: bool) -> None:
    """Stored over NaN or added to what is there; of an empty batch they are zero."""
    layer = make(UNEVEN._replace(batch=batch))
    results = []
    for body, (x, _, signal, weight, place, _) in ((conv, layer), (reference_conv, layer.double())):
        grads = [random(*size).to(x.dtype) for size in (weight.shape, weight.shape[:1])]
        if not accumulate:
            grads = [torch.full_like(grad, torch.nan) for grad in grads]
        body.conv_grad(signal, x, 0.5, *place, *grads, accumulate)
        results.append(grads)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_more_parts_than_a_tile_adds_at_once() -> None:
    """One tile of the gradient and many positions: the sum is shared out, and the same every time."""
    layer = make(Shape(2, 1, (12, 13), 2, (1, 1)))
    assert conv._shares(2 * 12 * 13, 1, 16)[0] > 16
    got = learn(conv, layer, SGD(0.1))
    assert_close(got, learn(reference_conv, layer.double(), SGD(0.1)), 2e-6)
    assert all(torch.equal(*pair) for pair in zip(got, learn(conv, layer, SGD(0.1)), strict=True))


def test_parts_cover_every_position_once() -> None:
    for places in (0, 1, 15, 16, 17, 51_200, 2**33):
        for tiles in (0, 1, 100, 5000):
            parts, steps = conv._shares(places, tiles, 16)
            assert parts * steps * 16 >= places
            assert places == 0 or (parts - 1) * steps * 16 < places


def test_without_inputs_the_bias_still_learns() -> None:
    layer = make(UNEVEN._replace(channels=0))
    got = learn(conv, layer, SGD(0.1), feedback=False)
    wanted = learn(reference_conv, layer.double(), SGD(0.1), feedback=False)
    assert error(got[1], wanted[1]) < 1e-6


@pytest.mark.parametrize("orders", ["first-last", "last-first"])
def test_nothing_outside_a_map_is_read(orders: str) -> None:
    """Maps between NaNs in memory: a window that left its map would bring them in."""
    plain = make(UNEVEN._replace(size=UNPOOLED), POOLS["borders"], orders)
    among = []
    for maps in plain[:3]:
        buffer = maps.new_full((maps.numel() + 256,), torch.nan)
        among.append(buffer.as_strided(maps.shape, maps.stride(), 128).copy_(maps))
    layer = Layer(*among, *plain[3:])
    for got, wanted in zip(errors(ekdaa, layer), errors(ekdaa, plain), strict=True):
        assert torch.equal(got, wanted)
    results = [
        learn(conv, maps._replace(z=maps.change), SGD(0.1)) for maps in (layer, plain)
    ]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("orders", ["first-last", "last-first"])
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_accumulates_in_float32(half: torch.dtype, orders: str) -> None:
    """Against float64 from the same numbers: roundings of the results, none of the sums."""
    bound = 2 * torch.finfo(half).eps
    for pool in ("halves", "overlap"):
        layer = make(SHAPES["colours"]._replace(size=UNPOOLED), POOLS[pool], orders, half)
        got, wanted = errors(ekdaa, layer), errors(reference, layer.double())
        assert {tensor.dtype for tensor in got} == {half}
        assert_close(got, wanted, bound)
    layer, rule = make(SHAPES["colours"], orders=orders, dtype=half), SGD(0.1, 0.9)
    assert_close(learn(conv, layer, rule), learn(reference_conv, layer.double(), rule), bound)


def test_float64_is_refused() -> None:
    layer = make(UNEVEN).double()
    for run in (lambda: errors(ekdaa, layer), lambda: learn(conv, layer, SGD(0.1))):
        with pytest.raises(TypeError, match="float64"):
            run()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_dense_feedback_learns_beside_the_weight(rule: UpdateRule) -> None:
    results = []
    post, pre = random(70, 20), random(70, 67, seed=1)
    for body, kind in ((dense, torch.float32), (reference_dense, torch.float64)):
        weight, bias, feedback = (
            t.to(kind) for t in (random(20, 67), random(20), random(20, 67, seed=4))
        )
        args = step_args(rule, weight, bias)
        kept = vars(rule.new_param_state(feedback)).values()
        body.dense_step(
            post.to(kind), pre.to(kind), weight, bias, feedback, 0.5, 0.1, *args, *kept
        )  # fmt: skip
        results.append([t for t in (weight, bias, feedback, *args[8:], *kept) if t is not None])
    assert_close(*results, 1e-5 if isinstance(rule, Adam) else 1e-6)


@pytest.mark.parametrize("size", [1, 700, 3 * update.BLOCK + 5])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3, math.inf])
def test_a_gradient_is_cut_to_its_length(size: int, max_norm: float) -> None:
    rule, results = SGD(0.5, 0.9), []
    for body, kind in ((update, torch.float32), (reference_update, torch.float64)):
        param, gradient = random(size).to(kind), random(size, seed=1).to(kind)
        state = rule.new_param_state(param)
        body.apply_update(param, gradient, -0.25, max_norm, *rule.args(), state.m, None, None)
        results.append([param, state.m])
    assert_close(*results)


def test_an_empty_gradient_has_a_length() -> None:
    param = random(0, 3)
    update.apply_update(param, param.clone(), 1.0, 1.0, *SGD(1.0).args(), None, None, None)
    assert param.shape == (0, 3)


def test_a_length_that_many_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than sums: each program takes several."""
    monkeypatch.setattr(update, "_MOST_SUMS", 4)
    gradient = random(9 * update.BLOCK + 3)
    param = torch.zeros_like(gradient)
    update.apply_update(param, gradient, 1.0, 2.0, *SGD(1.0).args(), None, None, None)
    assert error(param, -2 * gradient / gradient.norm()) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_lengths_of_any_size(value: float) -> None:
    """Neither 0 / 0 nor a square that is no float32."""
    param = torch.zeros(4, device=DEVICE)
    gradient = torch.full_like(param, value)
    update.apply_update(param, gradient, 1.0, 1.0, *SGD(1.0).args(), None, None, None)
    torch.testing.assert_close(param, -gradient.clamp(max=0.5))
