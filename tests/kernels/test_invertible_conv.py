"""Invertible convolutions: G7 to G9 of GAIT-prop's golden checks, every geometry, every order in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

from . import cases, layouts, plain
from . import golden_invertible as exact
from .cases import default_slope
from .conv_layers import ORDERS
from .golden import Array, activate
from .invertible_layers import (
    LAYERS,
    Drawn,
    Layer,
    draw,
    plain_carried_down,
    plain_forward,
    plain_reconstruct,
)
from .local_layers import arrays
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.op("invertible_conv_reconstruct"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning"),
]

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]
SMALL = LAYERS["everything"]


def check_reconstruction(
    got: Tensor, t: Drawn, layer: Layer, *, bias: bool = True, nudge: bool = True,
    activation: str = "leaky_relu", slope: float | None = None,
) -> None:  # fmt: skip
    """Compare x̂ with the formula."""
    tensors = [t.output, t.x, t.inverse, t.bias if bias else None]
    tensors += [t.target, t.rate] if nudge else [None, None]
    slope = default_slope(activation, slope) or 1.0
    wanted = exact.reconstruct(*arrays(*tensors), layer.windows, activation, slope)
    check("x", got, wanted, plain_reconstruct(*tensors, layer.windows, slope))


def reconstruct(
    t: Drawn,
    layer: Layer,
    backend: str | None,
    *,
    bias: bool = True,
    nudge: bool = True,
    **how: Any,
) -> Tensor:
    """The op, on a layer's tensors."""
    given = {"target": t.target, "rate": t.rate} if nudge else {}
    return bk.invertible_conv_reconstruct(
        t.output, t.x, t.inverse, t.bias if bias else None, **given, **layer.place, **how,
        backend=backend,
    )  # fmt: skip


def check_error(
    got: Tensor, signal: Tensor, kernel: Tensor, gate: Tensor | None, layer: Layer,
    activation: str = "leaky_relu", slope: float | None = None,
) -> None:  # fmt: skip
    """Compare δ with the formula; what no window holds has exactly none."""
    wanted = exact.carried_down(*arrays(signal, kernel), layer.windows)
    here = plain_carried_down(signal, kernel, layer.windows)
    if gate is not None:
        slope = default_slope(activation, slope)
        wanted = wanted * activate(to_numpy(gate), activation, slope)[1]
        z = gate.detach().clone().requires_grad_()
        y = plain.activate(z, activation, slope)
        here = torch.autograd.grad(y, z, here)[0] if y.requires_grad else torch.zeros_like(here)
    check("error", got, wanted, here)
    assert torch.count_nonzero(got.cpu()[..., torch.from_numpy(layer.windows.times() == 0)]) == 0


@pytest.mark.parametrize(("bias", "nudge"), [(True, True), (False, False)])
@pytest.mark.parametrize(("activation", "slope"), [("leaky_relu", 0.1), ("identity", None)])
@pytest.mark.parametrize("name", LAYERS)
def test_reconstruction(
    name: str, activation: str, slope: float | None, bias: bool, nudge: bool, target: Target,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The formula, from outputs that need not be those of x; nothing that is read is changed."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, dtype, device)
    snapshot = cases.Snapshot(vars(t))
    how: dict[str, Any] = {"bias": bias, "nudge": nudge, "activation": activation, "slope": slope}
    check_reconstruction(reconstruct(t, layer, backend, **how), t, layer, **how)
    snapshot.check_unchanged()


@pytest.mark.parametrize("activation", bk.INVERTIBLE_ACTIVATIONS)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_round_trip(name: str, precision: torch.dtype, activation: str, target: Target) -> None:
    """G7: x from its own output, to the digits of the dtype; what no window holds, to the bit."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, precision, device)
    x, weight, bias = arrays(t.x, t.weight, t.bias)
    z = exact.forward(x, weight, bias, layer.windows)
    slope = 0.1 if activation == "leaky_relu" else None
    t.output = torch.from_numpy(activate(z, activation, slope or 1.0)[0]).to(t.x)
    t.inverse = torch.from_numpy(exact.inverse_of(weight)).to(t.x)
    got = reconstruct(t, layer, backend, nudge=False, activation=activation, slope=slope)
    times = layer.windows.times()
    bound = 100 * torch.finfo(precision).eps * max(times.max(), 1)
    assert np.abs(to_numpy(got) - x).max() < bound * np.abs(x).max()
    untouched = torch.from_numpy(times == 0)
    assert torch.equal(got.cpu()[..., untouched], t.x.cpu()[..., untouched])


@pytest.mark.parametrize("name", LAYERS)
def test_overlap_count(name: str, target: Target) -> None:
    """G7: from an output of zeros and an x of ones, 1 − n, exactly; n is torch's fold of ones, too."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float32, device)
    t.output.zero_()
    t.x.fill_(1)
    got = reconstruct(t, layer, backend, bias=False, nudge=False)
    times = torch.from_numpy(layer.windows.times()).float()
    assert torch.equal(got.cpu(), (1 - times).expand_as(got))
    if layer.place.get("padding") not in ("same", "valid"):
        place = {"kernel_size": layer.kernel, **layer.place}
        counted = F.fold(F.unfold(torch.ones(1, 1, *layer.size), **place), layer.size, **place)
        assert torch.equal(counted[0, 0], times)


def test_rates_of_samples(target: Target) -> None:
    """Each sample is nudged by its own γ: not at all by 0, all the way by 1 without an activation."""
    backend, device = target
    t = draw(SMALL, torch.float32, device)
    t.rate = torch.tensor([0.0, 0.4, 1.0], device=device)
    for activation, slope in (("leaky_relu", 0.3), ("identity", None)):
        how: dict[str, Any] = {"activation": activation, "slope": slope}
        nudged = reconstruct(t, SMALL, backend, **how)
        check_reconstruction(nudged, t, SMALL, **how)
        at_rest = reconstruct(t, SMALL, backend, nudge=False, **how)
        assert torch.equal(nudged[0], at_rest[0])
        assert not torch.equal(nudged[1], at_rest[1])
    t.output, given = t.target, t.output
    there = reconstruct(t, SMALL, backend, nudge=False, activation="identity")
    t.output = given
    check("x", nudged[2], to_numpy(there[2]), there[2])


def test_kinks(target: Target) -> None:
    """G9: a nudge across the kink is taken back by the slope of where it ends, D is that of the start."""
    backend, device = target
    output = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0], device=device).view(6, 1, 1, 1)
    aim = torch.tensor([-3.0, 0.5, 31.0, 15.0, 2.0, -2.0], device=device).view(6, 1, 1, 1)
    rate = torch.full((6,), 0.5, device=device)
    got = bk.invertible_conv_reconstruct(
        output, output, torch.ones(1, 1, 1, 1, device=device), None, target=aim, rate=rate,
        slope=0.25, backend=backend,
    )  # fmt: skip
    # u = a + γ D² (t − a) with D = 1 above 0, 1/4 at and below it; f⁻¹(u) = u, or 4 u below 0
    wanted = [-4.0, 0.75, 0.0, -2.0, 0.0625, -0.25]
    assert got.flatten().tolist() == wanted


@pytest.mark.parametrize("order_of_x", ORDERS)
@pytest.mark.parametrize("order_above", ORDERS)
@pytest.mark.parametrize("order_of_target", ORDERS)
@pytest.mark.parametrize("name", ["k3 s2, same", "many channels"])
def test_orders(
    name: str, order_of_target: torch.memory_format, order_above: torch.memory_format,
    order_of_x: torch.memory_format, target: Target,
) -> None:  # fmt: skip
    """Every map with its channels first or last; the result lies as what it is an error or a copy of."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float32, device)
    t.x = t.x.contiguous(memory_format=order_of_x)
    t.output = t.output.contiguous(memory_format=order_above)
    t.target = t.target.contiguous(memory_format=order_of_target)
    got = reconstruct(t, layer, backend)
    check_reconstruction(got, t, layer)
    assert got.is_contiguous(memory_format=order_of_x)
    for gate, order in ((t.x, order_of_x), (None, order_above)):
        error = bk.invertible_conv_error(
            t.output, t.inverse, layer.size, gate=gate, **layer.place, backend=backend
        )
        check_error(error, t.output, t.inverse, gate, layer)
        assert error.is_contiguous(memory_format=order)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_slices(layout: str, target: Target) -> None:
    """Everything may lie in memory in any way, and is not touched."""
    backend, device = target
    t = draw(SMALL, torch.float32, device)
    laid = {name: layouts.laid_out(value, layout) for name, value in vars(t).items()}
    views = Drawn(**{name: entry.view for name, entry in laid.items()})
    check_reconstruction(reconstruct(views, SMALL, backend), t, SMALL)
    signal, kernel = views.output[:, :5], views.inverse[:5]
    got = bk.invertible_conv_error(
        signal, kernel, SMALL.size, gate=views.x, **SMALL.place, backend=backend
    )
    check_error(got, t.output[:, :5], t.inverse[:5], t.x, SMALL)
    for entry in laid.values():
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches(batch: int, target: Target, dtype: torch.dtype) -> None:
    """No sample, or one."""
    backend, device = target
    layer = LAYERS["k3 s2"].with_batch(batch)
    t = draw(layer, dtype, device)
    check_reconstruction(reconstruct(t, layer, backend), t, layer)
    for gate in (None, t.x):
        got = bk.invertible_conv_error(
            t.output, t.inverse, layer.size, gate=gate, **layer.place, backend=backend
        )
        check_error(got, t.output, t.inverse, gate, layer)


def test_what_is_left_out(target: Target) -> None:
    """Stride and dilation 1, no padding, no nudge, a leaky ReLU of slope 0.01, no derivative."""
    backend, device = target
    layer = LAYERS["k3 s1, no padding"]
    t = draw(layer, torch.float32, device)
    got = bk.invertible_conv_reconstruct(t.output, t.x, t.inverse, None, backend=backend)
    check_reconstruction(got, t, layer, bias=False, nudge=False)
    error = bk.invertible_conv_error(t.output, t.inverse, layer.size, backend=backend)
    check_error(error, t.output, t.inverse, None, layer)
    gated = bk.invertible_conv_error(t.output, t.inverse, layer.size, gate=t.x, backend=backend)
    check_error(gated, t.output, t.inverse, t.x, layer, "leaky_relu", 0.01)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_error(name: str, gated: bool, target: Target, dtype: torch.dtype) -> None:
    """The formula for all features, some, and one; nothing that is read is changed."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, dtype, device)
    gate = t.x if gated else None
    snapshot = cases.Snapshot(vars(t))
    for features in {1, layer.outputs // 2 or 1, layer.outputs}:
        signal, kernel = t.output[:, :features], t.inverse[:features]
        got = bk.invertible_conv_error(
            signal, kernel, layer.size, gate=gate, **layer.place, backend=backend
        )
        check_error(got, signal, kernel, gate, layer)
    snapshot.check_unchanged()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("order", ORDERS)
def test_channels(channels: int, order: torch.memory_format, target: Target) -> None:
    """Numbers of channels around whole vectors and blocks, above and below."""
    backend, device = target
    layer = Layer(2, channels, (3, 4), (2, 1), {"padding": (1, 0)})
    t = draw(layer, torch.float32, device)
    t.x, t.output = (maps.contiguous(memory_format=order) for maps in (t.x, t.output))
    check_reconstruction(reconstruct(t, layer, backend), t, layer)
    for features in (channels, 2 * channels):
        signal, kernel = t.output[:, :features], t.inverse[:features]
        got = bk.invertible_conv_error(
            signal, kernel, layer.size, gate=t.x, **layer.place, backend=backend
        )
        check_error(got, signal, kernel, t.x, layer)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_activations(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """Every derivative, at its kinks and jumps, too."""
    backend, device = target
    t = draw(SMALL, dtype, device)
    gate = (4 * t.x).round() / 4
    gate.view(-1)[:5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0]).to(gate)
    how: dict[str, Any] = {"activation": activation, "slope": slope}
    got = bk.invertible_conv_error(
        t.output, t.inverse, SMALL.size, gate=gate, **how, **SMALL.place, backend=backend
    )
    check_error(got, t.output, t.inverse, gate, SMALL, **how)


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal_weights_backpropagate(name: str, target: Target) -> None:
    """G8: through an orthogonal weight the error is the gradient that autograd finds."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float64, device, noise=0.0)
    z = t.x.clone().requires_grad_()
    plain_forward(torch.tanh(z), t.weight, layer.windows).backward(t.output)
    got = bk.invertible_conv_error(
        t.output, torch.from_numpy(exact.inverse_of(to_numpy(t.weight))).to(t.x), layer.size,
        gate=t.x, activation="tanh", **layer.place, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got, z.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k3 s1", "k2 s3", "same, dilated", "everything"])
def test_error_is_the_difference_of_reconstructions(name: str, target: Target) -> None:
    """t̂ − x: what a nudge changes in x̂ is the error of γ D (t − a), where it crosses no kink."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float64, device)
    t.rate = t.rate * 1e-6
    derivative = torch.where(t.output > 0, 1.0, 0.1).double()
    signal = t.rate.view(-1, 1, 1, 1) * derivative * (t.target - t.output)
    assert (derivative * signal.abs() < t.output.abs()).all()
    nudged, at_rest = (reconstruct(t, layer, backend, nudge=n, slope=0.1) for n in (True, False))
    error = bk.invertible_conv_error(signal, t.inverse, layer.size, **layer.place, backend=backend)
    torch.testing.assert_close(nudged - at_rest, error, rtol=1e-6, atol=1e-13)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled(backend: str | None) -> None:
    """Both ops in one graph each."""
    t = draw(SMALL, torch.float32, "cpu")

    def error() -> Tensor:
        return bk.invertible_conv_error(
            t.output, t.inverse, SMALL.size, gate=t.x, **SMALL.place, backend=backend
        )

    for call in (lambda: reconstruct(t, SMALL, backend), error):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call())


SLIPS: dict[str, Callable[[dict[str, Array]], Array]] = {
    "no correction": lambda t: t["right"] + (t["times"] - 1) * t["x"],
    "corrected by n": lambda t: t["right"] - t["x"],
    "no bias": lambda t: t["no bias"],
    "the target itself": lambda t: t["of the target"],
}


@pytest.mark.parametrize("wrong", SLIPS)
def test_wrong_formulas_are_rejected(wrong: str) -> None:
    """The comparison above has teeth: near misses of the formula fail it."""
    t = draw(SMALL, torch.float32, "cpu")
    output, x, inverse, bias, aim, rate = arrays(t.output, t.x, t.inverse, t.bias, t.target, t.rate)
    how = (SMALL.windows, "leaky_relu", 0.01)
    right = exact.reconstruct(output, x, inverse, bias, aim, rate, *how)
    near = {
        "right": right,
        "x": x,
        "times": SMALL.windows.times(),
        "no bias": exact.reconstruct(output, x, inverse, None, aim, rate, *how),
        "of the target": exact.reconstruct(aim, x, inverse, bias, None, None, *how),
    }
    check_reconstruction(torch.from_numpy(right).float(), t, SMALL)
    with pytest.raises(AssertionError, match=r"x .* allowed"):
        check_reconstruction(torch.from_numpy(SLIPS[wrong](near)).float(), t, SMALL)
