"""Locally connected layers against the dense matrix that they are (U6, U10): every geometry and order.

What every layer op has in common (rules, layouts, buffers) is in `test_layer`; masks and learning
feedback are in `test_local_conv_feedback`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases, golden, layouts, plain
from . import golden_local_conv as exact
from .cases import default_slope
from .local_layers import LAYERS, Drawn, Layer, arrays, draw
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.native,  # `test_triton_local_conv` chooses what to interpret
    pytest.mark.usefixtures("poisoned"),
    # torch's own convolution says that it pads a copy; only its result is of interest here.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]

ORDERS = (torch.contiguous_format, torch.channels_last)
"""Orders of maps in memory."""


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Every geometry."""
    return LAYERS[request.param]


def through_plain(
    signal: Tensor, weight: Tensor, like: Tensor, place: tuple[object, ...]
) -> Tensor:
    """The signal at the input by plain PyTorch's autograd."""
    x = torch.zeros_like(like, requires_grad=True)
    return torch.autograd.grad(plain.local_conv(x, weight, None, *place), x, signal)[0]


def check_forward(got: bk.LocalConvOutput, t: Drawn, layer: Layer, bias: Tensor | None) -> None:
    """Compare z with the formula."""
    z = exact.forward(*arrays(t.x, t.weight, bias), *layer.where)
    check("z", got.z, z, plain.local_conv(t.x, t.weight, bias, *layer.where))


def check_feedback(got: Tensor, t: Drawn, layer: Layer) -> None:
    """Compare the signal at the input, with no gate, with the formula."""
    signal, weight = arrays(t.signal, t.weight)
    wanted = exact.feedback(signal, weight, layer.size, *layer.where)
    check("feedback", got, wanted, through_plain(t.signal, t.weight, t.x, layer.where))


def check_gated(got: Tensor, t: Drawn, layer: Layer) -> None:
    """Compare the signal at the input, where the gate is a relu's field, with the formula."""
    signal, weight, gate = arrays(t.signal, t.weight, t.gate)
    wanted = exact.feedback(signal, weight, layer.size, *layer.where) * (gate > 0)
    here = through_plain(t.signal, t.weight, t.x, layer.where) * (t.gate > 0)
    check("gated", got, wanted, here)


def check_gradients(
    got: tuple[Tensor, Tensor | None], t: Drawn, layer: Layer, scale: float = 1.0
) -> None:
    """Compare the gradients of weight and bias with the formula."""
    wanted = exact.gradients(*arrays(t.signal, t.x, t.weight, t.bias), scale, *layer.where)
    by_torch = plain.local_conv_gradients(t.signal, t.x, t.weight, t.bias, scale, *layer.where)
    for name, *values in zip(("weight", "bias"), got, wanted, by_torch, strict=True):
        check(name, *values)


def test_forward(layer: Layer, target: Target, dtype: torch.dtype) -> None:
    """z of every geometry, with a bias and without."""
    backend, device = target
    t = draw(layer, dtype, device)
    for bias in (t.bias, None):
        got = bk.local_conv_forward(t.x, t.weight, bias, **layer.place, backend=backend)
        assert isinstance(got, bk.LocalConvOutput)
        assert got.output is got.z
        check_forward(got, t, layer, bias)


def test_feedback(layer: Layer, target: Target, dtype: torch.dtype) -> None:
    """The signal at the input in every geometry: pixels that no window holds get exactly 0."""
    backend, device = target
    t = draw(layer, dtype, device)
    got = bk.local_conv_feedback(t.signal, t.weight, layer.size, **layer.place, backend=backend)
    check_feedback(got, t, layer)
    ones = torch.ones_like(t.weight)
    reached = through_plain(torch.ones_like(t.signal), ones, t.x, layer.where) != 0
    assert torch.count_nonzero(got[~reached]) == 0


def test_gradients(layer: Layer, target: Target, dtype: torch.dtype) -> None:
    """Gradients of every geometry: those of taps that lie outside the map are exactly 0."""
    backend, device = target
    t = draw(layer, dtype, device)
    got = bk.local_conv_grad(t.signal, t.x, t.weight, t.bias, **layer.place, backend=backend)
    check_gradients(got, t, layer)
    ones = [torch.ones_like(tensor) for tensor in (t.signal, t.x, t.weight)]
    inside = plain.local_conv_gradients(*ones, None, 1.0, *layer.where).grad_weight != 0
    assert torch.count_nonzero(got[0][~inside]) == 0


def test_gradient_without_bias(target: Target) -> None:
    """No bias, no gradient of it; the scale is 1 where it is left out, and any number where given."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, device)
    for scale in (-0.3, 0.0, 1 / 3):
        weight, bias = bk.local_conv_grad(
            t.signal, t.x, t.weight, scale=scale, **layer.place, backend=backend
        )
        assert bias is None
        check_gradients((weight, scale * t.signal.sum(0).permute(1, 2, 0)), t, layer, scale)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_activations(
    activation: str, slope: float | None, target: Target, dtype: torch.dtype
) -> None:
    """f(z) of every activation beside z, in memory of its own; the arguments stay as they are."""
    backend, device = target
    layer = LAYERS["groups"]
    t = draw(layer, dtype, device, grid=activation in cases.KINKED)
    snapshot = cases.Snapshot(vars(t))
    got = bk.local_conv_forward(
        t.x, t.weight, t.bias, activation=activation, slope=slope, **layer.place, backend=backend
    )
    check_forward(got, t, layer, t.bias)
    slope = default_slope(activation, slope)
    z = exact.forward(*arrays(t.x, t.weight, t.bias), *layer.where)
    by_torch = plain.local_conv(t.x, t.weight, t.bias, *layer.where)
    wanted = golden.activate(z, activation, slope)[0]
    check("output", got.output, wanted, plain.activate(by_torch, activation, slope))
    if activation != "identity":
        before = got.z.clone()
        got.output.fill_(9)
        assert torch.equal(got.z, before)
    snapshot.check_unchanged()


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_gates(activation: str, slope: float | None, target: Target, dtype: torch.dtype) -> None:
    """f′ of the layer below, at its kinks, too."""
    backend, device = target
    layer = LAYERS["border"]
    t = draw(layer, dtype, device)
    t.gate = torch.linspace(-2.5, 2.5, 11, dtype=dtype, device=device)[
        torch.arange(t.x.numel(), device=device) % 11
    ].view_as(t.x)  # every half from -2.5 to 2.5: 0, and 1 / slope
    snapshot = cases.Snapshot(vars(t))
    got = bk.local_conv_feedback(
        t.signal, t.weight, layer.size, gate=t.gate, activation=activation, slope=slope,
        **layer.place, backend=backend,
    )  # fmt: skip
    slope = default_slope(activation, slope)
    signal, weight, gate = arrays(t.signal, t.weight, t.gate)
    below = exact.feedback(signal, weight, layer.size, *layer.where)
    wanted = below * golden.activate(gate, activation, slope)[1]
    field = t.gate.clone().requires_grad_()
    plain.activate(field, activation, slope).backward(
        through_plain(t.signal, t.weight, t.x, layer.where)
    )
    check("feedback", got, wanted, field.grad)
    snapshot.check_unchanged()


@pytest.mark.parametrize("slope", [1.0, 0.5, 2.0])
def test_the_bound_of_hardtanh_keeps_its_gradient(slope: float, target: Target) -> None:
    """U1, U4: |slope · field| ≤ 1 passes slope times the signal, equality included; beyond, nothing."""
    backend, device = target
    bound = torch.tensor(1 / slope, device=device)
    beyond = torch.nextafter(bound, 2 * bound)
    gate = torch.stack([bound, -bound, beyond, -beyond, 0 * bound]).view(1, 1, 1, 5)
    signal = torch.full_like(gate, 3.0)
    got = bk.local_conv_feedback(
        signal, torch.ones(1, 5, 1, 1, 1, 1, device=device), (1, 5), gate=gate,
        activation="hardtanh", slope=slope, backend=backend,
    )  # fmt: skip
    assert got.flatten().tolist() == [3 * slope, 3 * slope, 0.0, 0.0, 3 * slope]


@pytest.mark.parametrize("name", ["border", "stride", "same, even window", "everything"])
def test_tied_weights_are_a_convolution(name: str, target: Target, dtype: torch.dtype) -> None:
    """U10: with one kernel everywhere, all three ops are conv2d's; ∂W summed over positions is its ∂W."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, dtype, device)
    kernel = t.weight[0, 0].permute(3, 2, 0, 1).contiguous()
    bias = t.bias[0, 0]
    weight, biases = t.weight[:1, :1].expand_as(t.weight), bias.expand_as(t.bias)
    z = bk.local_conv_forward(t.x, weight, biases, **layer.place, backend=backend).z
    down = bk.local_conv_feedback(t.signal, weight, layer.size, **layer.place, backend=backend)
    grad, grad_bias = bk.local_conv_grad(
        t.signal, t.x, weight, biases, **layer.place, backend=backend
    )
    leaves = [tensor.double().requires_grad_() for tensor in (t.x, kernel, bias)]
    conv = F.conv2d(*leaves, **layer.place)
    conv.backward(t.signal.double())
    by_torch = [tensor.detach().clone().requires_grad_() for tensor in (t.x, kernel, bias)]
    conv_here = F.conv2d(*by_torch, **layer.place)
    conv_here.backward(t.signal)
    check("z", z, to_numpy(conv), conv_here)
    summed = grad.sum((0, 1)).permute(3, 2, 0, 1)
    for what, got, wanted, here in zip(
        ("x", "weight", "bias"),
        (down, summed, grad_bias.sum((0, 1))),
        leaves,
        by_torch,
        strict=True,
    ):
        check(what, got, to_numpy(wanted.grad), here.grad)


def test_weights_differ_from_place_to_place(target: Target) -> None:
    """One weight of one position moves z there and nowhere else."""
    backend, device = target
    layer = LAYERS["border"]
    t = draw(layer, torch.float32, device)
    before = bk.local_conv_forward(t.x, t.weight, **layer.place, backend=backend).z
    t.weight[2, 3, 1, 1, 0, 2] += 1  # the middle tap of position (2, 3) reads the pixel (2, 3)
    moved = bk.local_conv_forward(t.x, t.weight, **layer.place, backend=backend).z - before
    wanted = torch.zeros_like(moved)
    wanted[:, 2, 2, 3] = t.x[:, 0, 2, 3]
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-6)


def in_order(maps: Tensor, order: torch.memory_format) -> Tensor:
    """The same maps in that order in memory."""
    return maps.contiguous(memory_format=order)


@pytest.mark.parametrize("order", ORDERS, ids=["first", "last"])
@pytest.mark.parametrize("other", ORDERS, ids=["first", "last"])
@pytest.mark.parametrize("name", ["stride", "everything", "same, even window"])
def test_channels_first_or_last(
    name: str, other: torch.memory_format, order: torch.memory_format, target: Target
) -> None:
    """Maps in either order, mixed in every way; results lie as what they were made from."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float32, device)
    x, signal = in_order(t.x, order), in_order(t.signal, other)
    got = bk.local_conv_forward(
        x, t.weight, t.bias, activation="tanh", **layer.place, backend=backend
    )
    check_forward(got, t, layer, t.bias)
    assert got.z.is_contiguous(memory_format=order)
    assert got.output.is_contiguous(memory_format=order)
    check("output", got.output, to_numpy(got.z.tanh()), got.z.tanh())
    down = bk.local_conv_feedback(
        signal, t.weight, layer.size, gate=in_order(t.gate, order), activation="relu",
        **layer.place, backend=backend,
    )  # fmt: skip
    check_gated(down, t, layer)
    assert down.is_contiguous(memory_format=other)
    grads = bk.local_conv_grad(signal, x, t.weight, t.bias, **layer.place, backend=backend)
    check_gradients(grads, t, layer)
    assert grads[0].is_contiguous()


@pytest.mark.parametrize("order", ORDERS, ids=["first", "last"])
def test_strides_of_dimensions_of_one_element(order: torch.memory_format, target: Target) -> None:
    """One sample or one row, cut out of more: whatever its stride is, torch calls it contiguous."""
    backend, device = target
    layer = Layer(2, 3, 4, (2, 3), (1, 2), {})
    t = draw(layer, torch.float32, device)
    for cut in (slice(1), slice(0, 1)), (slice(0, 2, 2), slice(2)):
        x = in_order(t.x, order)[cut[0], :, cut[1]]
        signal = in_order(t.signal, order)[cut[0], :, cut[1]]
        weight = t.weight[: x.shape[2]]
        got = bk.local_conv_forward(x, weight, backend=backend)
        alone = Drawn(x.clone(), weight, t.bias[: x.shape[2]], signal.clone(), t.gate)
        here = Layer(1, 3, 4, (x.shape[2], 3), (1, 2), {})
        check_forward(got, alone, here, None)
        down = bk.local_conv_feedback(signal, weight, here.size, backend=backend)
        check_feedback(down, alone, here)
        grads = bk.local_conv_grad(signal, x, weight, alone.bias, backend=backend)
        check_gradients(grads, alone, here)


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, "expanded"])
def test_any_layout(layout: str, target: Target) -> None:
    """Everything that is read may lie in memory in any way, and stays as it is."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, device)
    if layout == "expanded":
        t = Drawn(**{name: tensor[:1].expand_as(tensor) for name, tensor in vars(t).items()})
        laid = t
    else:
        laid = Drawn(**{k: layouts.laid_out(tensor, layout).view for k, tensor in vars(t).items()})
    snapshot = cases.Snapshot(vars(laid))
    got = bk.local_conv_forward(laid.x, laid.weight, laid.bias, **layer.place, backend=backend)
    check_forward(got, t, layer, t.bias)
    down = bk.local_conv_feedback(
        laid.signal, laid.weight, layer.size, gate=laid.gate, activation="relu",
        **layer.place, backend=backend,
    )  # fmt: skip
    check_gated(down, t, layer)
    grads = bk.local_conv_grad(
        laid.signal, laid.x, laid.weight, laid.bias, **layer.place, backend=backend
    )
    check_gradients(grads, t, layer)
    snapshot.check_unchanged()


@pytest.mark.parametrize("order", ORDERS, ids=["first", "last"])
def test_no_samples(order: torch.memory_format, layer: Layer, target: Target) -> None:
    """An empty batch: empty maps of the right shape, gradients of 0, nothing to accumulate."""
    backend, device = target
    layer = layer.with_batch(0)
    t = draw(layer, torch.float32, device)
    x, signal = in_order(t.x, order), in_order(t.signal, order)
    z, output = bk.local_conv_forward(
        x, t.weight, t.bias, activation="tanh", **layer.place, backend=backend
    )
    assert z.shape == output.shape == t.signal.shape
    down = bk.local_conv_feedback(signal, t.weight, layer.size, **layer.place, backend=backend)
    assert down.shape == t.x.shape
    for grad in bk.local_conv_grad(signal, x, t.weight, t.bias, **layer.place, backend=backend):
        assert torch.count_nonzero(grad) == 0
    added = torch.full_like(t.weight, 2), torch.full_like(t.bias, 2)
    bk.local_conv_grad(
        signal, x, t.weight, t.bias, grad_weight=added[0], grad_bias=added[1], accumulate=True,
        **layer.place, backend=backend,
    )  # fmt: skip
    assert all(torch.equal(grad, torch.full_like(grad, 2)) for grad in added)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(0, 4, 1), (0, 4, 2), (4, 0, 2)])
def test_no_channels(inputs: int, outputs: int, groups: int, target: Target) -> None:
    """A layer without inputs is its bias; one without outputs sends nothing down."""
    backend, device = target
    layer = Layer(3, inputs, outputs, (3, 4), (2, 2), {"groups": groups})
    x = torch.ones(3, inputs, 3, 4, device=device)
    weight = torch.ones(2, 3, 2, 2, inputs // groups, outputs, device=device)
    bias = torch.arange(6.0 * outputs, device=device).view(2, 3, outputs)
    z = bk.local_conv_forward(x, weight, bias, **layer.place, backend=backend).z
    assert torch.equal(z, bias.permute(2, 0, 1).expand_as(z))
    down = bk.local_conv_feedback(z, weight, (3, 4), **layer.place, backend=backend)
    assert torch.equal(down, torch.zeros_like(x))
    grads = bk.local_conv_grad(z, x, weight, bias, **layer.place, backend=backend)
    assert grads[0].shape == weight.shape
    assert torch.equal(grads[1], 3 * bias)


def test_no_graph_is_made(target: Target) -> None:
    """Parameters are taken as they are; nothing that comes back is differentiable."""
    backend, device = target
    layer = LAYERS["stride"]
    t = draw(layer, torch.float32, device)
    for tensor in vars(t).values():
        tensor.requires_grad_()
    results = [
        *bk.local_conv_forward(t.x, t.weight, t.bias, **layer.place, backend=backend),
        bk.local_conv_feedback(
            t.signal, t.weight, layer.size, gate=t.gate, **layer.place, backend=backend
        ),
        *bk.local_conv_grad(t.signal, t.x, t.weight, t.bias, **layer.place, backend=backend),
    ]
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("order", ORDERS, ids=["first", "last"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_number_of_threads(kind: torch.dtype, order: torch.memory_format) -> None:
    """How the work is shared out must not show in the results of the C++ body."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    layer = Layer(33, 16, 24, (9, 8), (3, 3), {"padding": 1, "stride": 2})
    t = draw(layer, kind, "cpu")
    x, signal = in_order(t.x, order), in_order(t.signal, order)
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            down = bk.local_conv_feedback(
                signal, t.weight, layer.size, gate=t.gate, activation="tanh", **layer.place,
                backend="cpp",
            )  # fmt: skip
            grads = bk.local_conv_grad(signal, x, t.weight, t.bias, **layer.place, backend="cpp")
            runs.append((*bk.local_conv_forward(x, t.weight, t.bias, **layer.place), down, *grads))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(run, runs[0], strict=True))
