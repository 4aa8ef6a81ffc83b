"""`local_conv` as an ordinary differentiable function: every order, masks, compiled, under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import golden_local_conv as exact
from . import plain
from .local_layers import LAYERS, Drawn, Layer, arrays, draw
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = [
    pytest.mark.native,
    # torch's own convolution says that it pads a copy; only its result is of interest here.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning"),
    pytest.mark.usefixtures("fresh_dynamo", "poisoned"),
]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled in one test is seen by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["reference", "cpp"])
def exact_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes in float64."""
    backend: str = request.param
    if not backends.status(backend).usable:
        pytest.skip(backends.status(backend).reason)
    return backend


def leaves(t: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, to be differentiated by."""
    x, weight, bias = (tensor.detach().clone() for tensor in (t.x, t.weight, t.bias))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("name", LAYERS)
def test_first_order(name: str, target: Target, dtype: torch.dtype) -> None:
    """z, and the gradients of x, weight and bias, in every geometry."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, dtype, device)
    inputs = leaves(t)
    z = bk.local_conv(*inputs, **layer.place, backend=backend)
    grads = torch.autograd.grad(z, inputs, t.signal)
    others = leaves(t)
    here = plain.local_conv(*others, *layer.where)
    by_torch = torch.autograd.grad(here, others, t.signal)
    x, weight, bias, signal = arrays(t.x, t.weight, t.bias, t.signal)
    check("z", z, exact.forward(x, weight, bias, *layer.where), here)
    wanted = [exact.feedback(signal, weight, layer.size, *layer.where)]
    wanted += exact.gradients(signal, x, weight, bias, 1.0, *layer.where)
    for what, *values in zip(("x", "weight", "bias"), grads, wanted, by_torch, strict=True):
        check(what, *values)


def penalty(
    run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], signal: Tensor
) -> Iterator[Tensor]:
    """Gradients of the sum of squares of z's gradients: second order by every input, and by δ."""
    delta = signal.detach().clone().requires_grad_()
    first = torch.autograd.grad(run(*inputs), inputs, delta, create_graph=True)
    total = sum(grad.pow(2).sum() for grad in first)
    yield from torch.autograd.grad(total, (inputs[0], inputs[1], delta))


@pytest.mark.parametrize("name", ["stride", "groups", "everything", "same, dilated"])
def test_second_order(name: str, target: Target) -> None:
    """A gradient penalty, by any backend."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, torch.float32, device)

    def run(*inputs: Tensor) -> Tensor:
        return bk.local_conv(*inputs, **layer.place, backend=backend)

    def run_plain(*inputs: Tensor) -> Tensor:
        return plain.local_conv(*inputs, *layer.where)

    wide = Drawn(**{what: tensor.double() for what, tensor in vars(t).items()})
    for what, got, wanted, here in zip(
        ("x", "weight", "signal"),
        penalty(run, leaves(t), t.signal),
        penalty(run_plain, leaves(wide), wide.signal),
        penalty(run_plain, leaves(t), t.signal),
        strict=True,
    ):
        check(what, got, to_numpy(wanted), here)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_differences(name: str, exact_backend: str) -> None:
    """gradcheck and gradgradcheck along random directions, in every geometry."""
    layer = LAYERS[name]
    inputs = leaves(draw(layer, torch.float64, "cpu"))

    def run(*tensors: Tensor) -> Tensor:
        return bk.local_conv(*tensors, **layer.place, backend=exact_backend)

    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_entry_of_the_gradients(masked: bool, bias: bool, exact_backend: str) -> None:
    """gradcheck and gradgradcheck entry by entry; a masked weight is one that is 0 for good."""
    layer = Layer(2, 2, 2, (3, 2), (2, 2), {"padding": (0, 1), "stride": (1, 2), "groups": 2})
    t = draw(layer, torch.float64, "cpu")
    mask = t.weight > 0 if masked else None
    inputs = leaves(t) if bias else leaves(t)[:2]

    def run(x: Tensor, weight: Tensor, *of_output: Tensor) -> Tensor:
        live = weight if mask is None else weight * mask
        return bk.local_conv(x, live, *of_output, mask=mask, **layer.place, backend=exact_backend)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_a_masked_gradient_is_differentiable(exact_backend: str) -> None:
    """By the signal and by x: what the mask stops does not come back in the second order."""
    layer = LAYERS["one position"]
    t = draw(layer, torch.float64, "cpu")
    mask = t.weight > 0
    weight = t.weight.requires_grad_()

    def gradient(x: Tensor, signal: Tensor) -> Tensor:
        z = bk.local_conv(x, weight, mask=mask, **layer.place, backend=exact_backend)
        return torch.autograd.grad(z, weight, signal, create_graph=True)[0]

    assert gradcheck(gradient, (t.x.requires_grad_(), t.signal.requires_grad_()))


def test_mask_stops_the_gradient(target: Target, dtype: torch.dtype) -> None:
    """The weight's gradient is 0 where the mask is False; z and the gradient of x do not read it."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, dtype, device)
    mask = t.weight > 0
    results = []
    for given in (mask, None):
        inputs = leaves(t)
        z = bk.local_conv(*inputs, mask=given, **layer.place, backend=backend)
        results.append((z, *torch.autograd.grad(z, inputs, t.signal)))
    masked, free = results
    for index in (0, 1, 3):
        assert torch.equal(masked[index], free[index])
    assert torch.count_nonzero(masked[2][~mask]) == 0
    check("weight", masked[2], to_numpy(free[2] * mask), free[2] * mask)
    assert torch.count_nonzero(free[2][~mask]) > 0


class Recorder(TorchDispatchMode):
    """Names of this library's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "bpfree":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


COSTS = {"x": {"local_conv_input_grad"}, "weight": {"local_conv_weight_grad"}, "bias": set()}
"""The ops that the gradient of each input takes; that of the bias is a sum."""


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("x", "weight"), ("weight", "bias")]
)
def test_a_gradient_that_nobody_wants_is_not_computed(wanted: tuple[str, ...]) -> None:
    """Only what requires a gradient costs anything, and only that gets one."""
    layer = LAYERS["border"]
    t = draw(layer, torch.float32, "cpu")
    inputs = {name: getattr(t, name).requires_grad_(name in wanted) for name in COSTS}
    z = bk.local_conv(*inputs.values(), **layer.place)
    with Recorder() as record:
        z.sum().backward()
    assert record.names == set().union(*(COSTS[name] for name in wanted))
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)


def test_no_graph_without_a_gradient(target: Target) -> None:
    """Nothing is kept where nothing is to be differentiated."""
    backend, device = target
    layer = LAYERS["stride"]
    t = draw(layer, torch.float32, device)
    assert not bk.local_conv(t.x, t.weight, **layer.place, backend=backend).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = bk.local_conv(
                t.x, t.weight.requires_grad_(), t.bias, **layer.place, backend=backend
            )
        assert not z.requires_grad
        wanted = bk.local_conv_forward(t.x, t.weight, t.bias, **layer.place, backend=backend).z
        assert torch.equal(z, wanted)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("signal_last", [False, True])
def test_channels_last(signal_last: bool, x_last: bool, target: Target) -> None:
    """Maps with the channels last, on either side or both: the same gradients, results alike in order."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, device)
    plain_inputs, inputs = leaves(t), leaves(t)
    signal = t.signal
    if x_last:
        inputs = (inputs[0].detach().to(memory_format=torch.channels_last), *inputs[1:])
        inputs[0].requires_grad_()
    if signal_last:
        signal = signal.to(memory_format=torch.channels_last)
    z = bk.local_conv(*inputs, **layer.place, backend=backend)
    order = torch.channels_last if x_last else torch.contiguous_format
    assert z.is_contiguous(memory_format=order)
    here = plain.local_conv(*plain_inputs, *layer.where)
    for what, got, wanted in zip(
        ("x", "weight", "bias"),
        torch.autograd.grad(z, inputs, signal),
        torch.autograd.grad(here, plain_inputs, t.signal),
        strict=True,
    ):
        check(what, got, to_numpy(wanted), wanted)


def test_views_and_expanded_gradients(target: Target) -> None:
    """A transposed weight, a sliced input, and a gradient that is one number for all."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, device)
    wide = torch.cat([t.x, t.x], 1).requires_grad_()
    turned = t.weight.transpose(0, 5).contiguous().requires_grad_()
    z = bk.local_conv(wide[:, ::2], turned.transpose(0, 5), t.bias, **layer.place, backend=backend)
    got = torch.autograd.grad(z.sum(), (wide, turned))
    inputs = leaves(t)
    here = plain.local_conv(wide[:, ::2], inputs[1], t.bias, *layer.where)
    wanted = torch.autograd.grad(here.sum(), (wide, inputs[1]))
    check("x", got[0], to_numpy(wanted[0]), wanted[0])
    check("weight", got[1].transpose(0, 5), to_numpy(wanted[1]), wanted[1])


@pytest.mark.parametrize("name", LAYERS)
def test_no_samples(name: str, target: Target) -> None:
    """An empty batch goes through, and its gradients are 0."""
    backend, device = target
    layer = LAYERS[name].with_batch(0)
    inputs = leaves(draw(layer, torch.float32, device))
    z = bk.local_conv(*inputs, **layer.place, backend=backend)
    assert z.shape == (0, layer.outputs, *layer.positions())
    z.sum().backward()
    assert inputs[0].grad.shape == inputs[0].shape
    assert torch.count_nonzero(inputs[1].grad) == torch.count_nonzero(inputs[2].grad) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_compiled(order: torch.memory_format, masked: bool) -> None:
    """Forward and backward in one graph each, as without the compiler."""
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, "cpu")
    mask = t.weight > 0 if masked else None

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = bk.local_conv(x * 2, weight, bias, mask=mask, **layer.place)
        return z.tanh().pow(2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, loss):
        inputs = leaves(t)
        value = run(inputs[0].to(memory_format=order), *inputs[1:])
        results.append((value, *torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(*results)


def test_one_graph_for_every_batch() -> None:
    """A smaller last batch compiles nothing anew."""
    layer = LAYERS["border"]
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bk.local_conv(x, weight, bias, **layer.place).tanh().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (7, 9, 12):  # none is the size of something else, too
        inputs = leaves(draw(layer.with_batch(batch), torch.float32, "cpu"))
        got = torch.autograd.grad(compiled(*inputs), inputs)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_on_the_cpu(compiled: bool) -> None:
    """float32 in and out, whatever came before in half precision, and gradients in each leaf's dtype."""
    layer = LAYERS["stride"]
    t = draw(layer, torch.float32, "cpu")

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return bk.local_conv(x, weight, bias, **layer.place)

    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    x = t.x.bfloat16().requires_grad_()
    weight, bias = (tensor.requires_grad_() for tensor in (t.weight, t.bias))
    z = call(x, weight, bias)
    assert z.dtype == torch.float32
    assert torch.equal(z, bk.local_conv_forward(x.float(), weight, bias, **layer.place).z)
    grads = torch.autograd.grad(z, (x, weight, bias), t.signal)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    wanted = bk.local_conv_grad(t.signal, x.float(), weight, bias, **layer.place)
    torch.testing.assert_close(grads[1:], wanted)


def test_shapes_without_memory() -> None:
    """On the meta device a layer says what shape comes out, forward and backward."""
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, "cpu")
    inputs = tuple(tensor.to("meta").requires_grad_() for tensor in (t.x, t.weight, t.bias))
    z = bk.local_conv(*inputs, **layer.place)
    assert z.is_meta
    assert z.shape == t.signal.shape
    z.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_a_weight_that_has_learnt_since_says_so(target: Target) -> None:
    """Backward through a weight that `local_conv_step` has changed is an error, not a wrong gradient."""
    backend, device = target
    layer = LAYERS["border"]
    t = draw(layer, torch.float32, device)
    weight = nn.Parameter(t.weight)
    z = bk.local_conv(t.x.requires_grad_(), weight, **layer.place, backend=backend)
    bk.local_conv_step(t.signal, t.x, weight, None, bk.SGD(0.1), **layer.place, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
