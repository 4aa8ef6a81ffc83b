"""What a convolution learns from a signal at its output units (E3): every geometry, order and batch.

What every layer op has in common (rules, layouts, buffers) is in `test_layer`; an error kernel that learns
beside the weight is in `test_ekdaa_learning`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from . import golden_ekdaa as exact
from .conv_layers import LAYERS, ORDERS, Drawn, Layer, draw
from .local_layers import arrays
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # torch's own convolution says that it pads a copy; only its result is of interest here.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

UNEVEN = LAYERS["everything"]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Every geometry."""
    return LAYERS[request.param]


def gradients(t: Drawn, layer: Layer, backend: str, **options: object) -> tuple[Tensor, Tensor]:
    """The op's gradients of weight and bias."""
    weight, bias = bk.conv_grad(
        t.signal, t.x, t.weight, t.bias, **layer.place, **options, backend=backend
    )
    assert bias is not None
    return weight, bias


def check_gradients(
    got: tuple[Tensor, ...], t: Drawn, layer: Layer, scale: float = 1.0, added: float = 0.0
) -> None:
    """Compare the gradients of weight and bias, on top of what was `added` to, with the formula."""
    wanted = exact.gradients(*arrays(t.signal, t.x, t.weight, t.bias), scale, *layer.where)
    here = plain.conv_gradients(t.signal, t.x, t.weight, t.bias, scale, *layer.where)
    for name, actual, formula, by_torch in zip(("weight", "bias"), got, wanted, here, strict=True):
        check(name, actual, formula + added, by_torch + added)


def test_gradients(layer: Layer, target: Target, dtype: torch.dtype) -> None:
    """Every geometry: the gradients of a window's elements that never lie on the map are exactly 0."""
    backend, device = target
    t = draw(layer, dtype, device)
    got = gradients(t, layer, backend)
    check_gradients(got, t, layer)
    ones = [np.ones(tensor.shape) for tensor in (t.signal, t.x, t.weight)]
    outside = exact.gradients(*ones, None, 1.0, *layer.where).grad_weight == 0
    assert torch.count_nonzero(got[0].cpu()[torch.from_numpy(outside)]) == 0


@pytest.mark.parametrize("order_of_x", ORDERS)
@pytest.mark.parametrize("order_of_signal", ORDERS)
@pytest.mark.parametrize("name", ["everything", "many outputs", "one pixel", "depthwise"])
def test_orders(
    name: str, order_of_signal: torch.memory_format, order_of_x: torch.memory_format, target: Target
) -> None:
    """Signal and input each with the channels first or last: the same gradients."""
    backend, device = target
    t = draw(LAYERS[name], torch.float32, device)
    t.signal = t.signal.contiguous(memory_format=order_of_signal)
    t.x = t.x.contiguous(memory_format=order_of_x)
    snapshot = cases.Snapshot(vars(t))
    check_gradients(gradients(t, LAYERS[name], backend), t, LAYERS[name])
    snapshot.check_unchanged()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", ["everything", "depthwise"])
def test_slices(name: str, layout: str, target: Target) -> None:
    """Signal and input with gaps, or in neither order, and a weight in any layout."""
    backend, device = target
    t = draw(LAYERS[name], torch.float32, device)
    laid = {key: layouts.laid_out(getattr(t, key), layout) for key in ("signal", "x", "weight")}
    views = Drawn(**{**vars(t), **{key: entry.view for key, entry in laid.items()}})
    check_gradients(gradients(views, LAYERS[name], backend), t, LAYERS[name])
    for entry in laid.values():
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 70])
@pytest.mark.parametrize("order", ORDERS)
def test_channels(channels: int, order: torch.memory_format, target: Target) -> None:
    """Numbers of channels around whole vectors and blocks, on either side of the layer."""
    backend, device = target
    for inputs, outputs in ((channels, 3), (3, channels)):
        layer = Layer(2, inputs, outputs, (3, 4), (3, 2), {"padding": 1})
        t = draw(layer, torch.float32, device)
        t.signal, t.x = (maps.contiguous(memory_format=order) for maps in (t.signal, t.x))
        check_gradients(gradients(t, layer, backend), t, layer)


@pytest.mark.parametrize("batch", [0, 1, 2, 17])
def test_batches(batch: int, target: Target, dtype: torch.dtype) -> None:
    """Any number of samples; of none, the gradients are 0, and nothing is added."""
    backend, device = target
    layer = UNEVEN.with_batch(batch)
    t = draw(layer, dtype, device)
    check_gradients(gradients(t, layer, backend), t, layer)
    given = {"grad_weight": torch.full_like(t.weight, 2), "grad_bias": torch.full_like(t.bias, 2)}
    added = gradients(t, layer, backend, accumulate=True, **given)
    check_gradients(added, t, layer, added=2.0)


@pytest.mark.parametrize("scale", [1.0, -0.125, 1 / 3, 0.0])
def test_scales(scale: float, target: Target, dtype: torch.dtype) -> None:
    """Gradients with every kind of factor, and with a factor added to what is there."""
    backend, device = target
    t = draw(UNEVEN, dtype, device)
    check_gradients(gradients(t, UNEVEN, backend, scale=scale), t, UNEVEN, scale)
    given = {"grad_weight": torch.full_like(t.weight, 2), "grad_bias": torch.full_like(t.bias, 2)}
    added = gradients(t, UNEVEN, backend, scale=scale, accumulate=True, **given)
    assert added[0] is given["grad_weight"]
    check_gradients(added, t, UNEVEN, scale, added=2.0)


def test_nothing_wanted_of_a_bias(target: Target) -> None:
    """Without a bias there is no gradient of it."""
    backend, device = target
    t = draw(UNEVEN, torch.float32, device)
    got = bk.conv_grad(t.signal, t.x, t.weight, **UNEVEN.place, backend=backend)
    assert got[1] is None
    check_gradients((got[0], t.signal.sum((0, 2, 3))), t, UNEVEN)


def test_steps(layer: Layer, target: Target) -> None:
    """One step in every geometry is the gradients, applied: W, b and E, each with state of its own."""
    backend, device = target
    t = draw(layer, torch.float32, device)
    rule, scale, gamma = bk.SGD(0.1, momentum=0.9, weight_decay=0.1), -0.5, 0.25
    grads = gradients(t, layer, backend, scale=scale)
    states = [rule.new_param_state(param) for param in (t.weight, t.bias, t.feedback)]
    for seed, state in enumerate(states, start=1):
        assert state.m is not None
        state.m.copy_(torch.from_numpy(np.random.default_rng(seed).standard_normal(state.m.shape)))
    expected = [tensor.clone() for tensor in (t.weight, t.bias, t.feedback)]
    kept = [bk.ParamState(state.m.clone()) for state in states]
    for param, grad, factor, state in zip(
        expected, (*grads, grads[0]), (1, 1, gamma), kept, strict=True
    ):
        bk.apply_update(param, grad, rule, state, scale=factor, backend=backend)
    bk.conv_step(
        t.signal, t.x, t.weight, t.bias, rule, bk.LayerState(*states[:2]), feedback=t.feedback,
        feedback_state=states[2], feedback_scale=gamma, scale=scale, **layer.place, backend=backend,
    )  # fmt: skip
    for name, param, wanted, state, moment in zip(
        "Wbe", (t.weight, t.bias, t.feedback), expected, states, kept, strict=True
    ):
        check(name, param, to_numpy(wanted), wanted)
        check(f"{name} m", state.m, to_numpy(moment.m), moment.m)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float, target: Target) -> None:
    """In the gradients of its own channels, and in no others."""
    backend, device = target
    layer = LAYERS["groups"]
    t = draw(layer, torch.float32, device)
    t.signal[1, 4, 0, 0] = value
    weight, bias = gradients(t, layer, backend)
    spoilt = ~torch.isfinite(weight)
    assert spoilt[4].all()
    assert spoilt.sum() == spoilt[4].numel()
    assert (~torch.isfinite(bias)).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["everything", "many samples", "many inputs", "one pixel"])
def test_number_of_threads(name: str, order: torch.memory_format) -> None:
    """How the work is shared out must not show in what the C++ body computes."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    t = draw(LAYERS[name], torch.float32, "cpu")
    t.signal, t.x = (maps.contiguous(memory_format=order) for maps in (t.signal, t.x))
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(gradients(t, LAYERS[name], "cpp"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(run, runs[0], strict=True))


WRONG: dict[str, Callable[[golden.Array, golden.Array], tuple[golden.Array, golden.Array]]] = {
    "flipped sign": lambda dw, db: (-dw, -db),
    "mean over the batch": lambda dw, db: (dw / 3, db / 3),
    "mean over the positions": lambda dw, db: (dw / 20, db / 20),
    "flipped window": lambda dw, db: (dw[:, :, ::-1, ::-1], db),
    "groups mixed up": lambda dw, db: (np.roll(dw, 3, 0), db),
    "inputs mixed up": lambda dw, db: (dw[:, ::-1], db),
    "unscaled bias": lambda dw, db: (dw, db / 2),
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparison above has teeth: near misses of the formula fail it in every dtype."""
    t = draw(UNEVEN, precision, "cpu")
    right = exact.gradients(*arrays(t.signal, t.x, t.weight, t.bias), 2.0, *UNEVEN.where)

    def compare(results: tuple[golden.Array, ...]) -> None:
        got = tuple(torch.from_numpy(result.copy()).to(precision) for result in results)
        check_gradients(got, t, UNEVEN, 2.0)

    compare(right)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(WRONG[wrong](*right))
