"""Layers whose error goes down through feedback weights R: values, and where each gradient comes from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from feedback_layers import MODES, batch, each_kind, network, of_kind
from torch import Tensor, nn

import bpfree
from bpfree.nn import FeedbackConv2d, FeedbackLinear, feedback_weights
from bpfree_kernels import local_conv


def ordinary(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer with some weight, as torch's and bpfree's ordinary ops compute it."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    place = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, *place)
    names = ("stride", "padding", "dilation", "groups")
    return local_conv(x, weight, layer.bias, **dict(zip(names, place, strict=True)))


def down_weight(layer: nn.Module) -> Tensor:
    """What the error goes down through."""
    feedback = layer.feedback.detach()
    return feedback.abs() * layer.weight.sign() if layer.mode == "sign" else feedback


@each_kind
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(kind: str, mode: str) -> None:
    """z, ∂W, ∂b as the ordinary layer; ∂x as the ordinary layer with R in W's place."""
    make, x = of_kind(kind)
    layer = make(mode=mode, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    z, wanted = layer(inputs[0]), ordinary(layer, layer.weight, inputs[1])
    torch.testing.assert_close(z, wanted)
    signal = torch.randn_like(z)
    z.backward(signal)
    got = (layer.weight.grad, layer.bias.grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (layer.weight, layer.bias), signal))
    ordinary(layer, down_weight(layer), inputs[2]).backward(signal)
    torch.testing.assert_close(inputs[0].grad, inputs[2].grad)
    if mode == "updated":
        assert torch.equal(layer.feedback.grad, layer.weight.grad)
    else:
        assert layer.feedback.grad is None
    torch.testing.assert_close(layer(x[0]), z[0])


@pytest.mark.parametrize("padding_mode", ["circular", "reflect"])
def test_padding_modes_of_convolutions(padding_mode: str) -> None:
    place = {"padding": (1, 2), "padding_mode": padding_mode, "dtype": torch.float64}
    layer, plain = FeedbackConv2d(2, 3, 3, **place), nn.Conv2d(2, 3, 3, **place)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    torch.testing.assert_close(z, plain(x))
    plain.weight.data.copy_(layer.feedback)
    signal = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(z, x, signal), torch.autograd.grad(plain(x), x, signal)
    )


def test_feedback_alignment_of_three_layers() -> None:
    """U1: δ_{l−1} = f′ ⊙ R δ_l and ∂W_l = δ_lᵀ y_{l−1}, written out."""
    torch.manual_seed(1)
    model = nn.Sequential(
        FeedbackLinear(6, 5), nn.Tanh(), FeedbackLinear(5, 4), nn.Tanh(), FeedbackLinear(4, 3)
    ).double()
    x, target = torch.randn(7, 6).double(), torch.randn(7, 3).double()
    (0.5 * (model(x) - target).square().sum()).backward()
    first, second, third = model[0], model[2], model[4]
    with torch.no_grad():
        y1 = torch.tanh(first(x))
        y2 = torch.tanh(second(y1))
        delta3 = third(y2) - target
        delta2 = (1 - y2**2) * (delta3 @ third.feedback)
        delta1 = (1 - y1**2) * (delta2 @ second.feedback)
    for layer, delta, pre in ((first, delta1, x), (second, delta2, y1), (third, delta3, y2)):
        torch.testing.assert_close(layer.weight.grad, delta.t() @ pre)
        torch.testing.assert_close(layer.feedback.grad, delta.t() @ pre)
        torch.testing.assert_close(layer.bias.grad, delta.sum(0))


@each_kind
def test_with_the_weights_as_feedback_it_is_backpropagation(kind: str) -> None:
    """U3: R = W."""
    make, x = of_kind(kind)
    layer = make(mode="fixed", dtype=torch.float64)
    layer.feedback.data.copy_(layer.weight)
    at = x.clone().requires_grad_()
    z = layer(at)
    signal = torch.randn_like(z)
    wanted = torch.autograd.grad(ordinary(layer, layer.weight, at), at, signal)
    torch.testing.assert_close(torch.autograd.grad(z, at, signal), wanted)


@each_kind
def test_first_layer_computes_no_input_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x = of_kind(kind)
    calls = []
    layer = make(dtype=torch.float64)
    send_down = bpfree.nn.feedback.FeedbackLayer.send_down

    def count(self: nn.Module, z: Tensor, x: Tensor, down: object, place: object) -> Tensor:
        def counted(*args: object) -> Tensor:
            calls.append(args)
            return down(*args)

        return send_down(self, z, x, counted, place)

    monkeypatch.setattr(bpfree.nn.feedback.FeedbackLayer, "send_down", count)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert not calls
    layer(x.requires_grad_()).sum().backward()
    assert len(calls) == 1


@each_kind
def test_old_feedback_is_guarded(kind: str) -> None:
    """R changed between forward and backward: an error as torch has for W, no wrong gradient."""
    make, x = of_kind(kind)
    layer = make(dtype=torch.float64)
    z = layer(x.requires_grad_())
    with torch.no_grad():
        layer.feedback.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole(mode: str) -> None:
    model = network(torch.float32, mode=mode)
    x, y = batch(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        for feedback in feedback_weights(model):
            feedback.grad = None
        at = x.clone().requires_grad_()
        F.cross_entropy(run(at), y).backward()
        tensors = (at, *model.parameters(), *feedback_weights(model))
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    model = network(torch.float32, mode=mode)
    x, _ = batch(torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x)
    assert z.dtype == torch.bfloat16
    (low,) = torch.autograd.grad(z.float().square().sum(), x)
    (full,) = torch.autograd.grad(model(x).square().sum(), x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.05 * full.abs().max().item())


@each_kind
def test_empty_batch(kind: str) -> None:
    make, x = of_kind(kind)
    layer = make(dtype=torch.float64)
    empty = x[:0].requires_grad_()
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert layer.weight.grad.count_nonzero() == layer.feedback.grad.count_nonzero() == 0


@each_kind
def test_no_gradient_wanted(kind: str) -> None:
    make, x = of_kind(kind)
    layer = make(dtype=torch.float64)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_saturated_linear_keeps_the_derivative_at_its_bounds() -> None:
    z = torch.tensor([-3.0, -2.0, -0.5, 2.0, 2.5], requires_grad=True)
    f = bpfree.nn.SaturatedLinear(0.5)(z)
    f.sum().backward()
    assert f.tolist() == [-1, -1, -0.25, 1, 1]
    assert z.grad.tolist() == [0, 0.5, 0.5, 0.5, 0]
    with pytest.raises(ValueError, match="slope"):
        bpfree.nn.SaturatedLinear(0)


def test_untying_loses_no_feedback() -> None:
    conv = bpfree.nn.FeedbackConv2d(2, 3, 3)
    with pytest.raises(TypeError, match="feedback weights would be lost"):
        bpfree.nn.LocallyConnected2d.from_conv2d(conv, 5)
