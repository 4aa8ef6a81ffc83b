"""PEPITA: its gradients, against two literal passes and against the equations (P1-P8, P10)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from nets import conv, conv_batch, dense, dense_batch
from pepita_equations import NETS, Array, assert_same_grads, passes, plain_twin, relu_net, softmax
from torch import Tensor, nn

import bpfree
from bpfree.plain import PlainPEPITA


def compare(
    make: Callable[..., nn.Sequential],
    batch: tuple[Tensor, Tensor],
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    """Gradients, loss and output are those of two literal passes with the same dropout."""
    x, y = batch
    chosen = {"feedback_scale": 1.0, **options}  # large, so that the second pass differs well
    learner = bpfree.PEPITA(make(), seed=3, input_shape=x.shape[1:], **chosen)
    model = make()
    plain = plain_twin(learner, model)
    torch.manual_seed(11)
    got = learner.grads(x, y)
    torch.manual_seed(11)
    wanted = plain.backward(x, y)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(got.output, wanted.output, rtol=tolerance, atol=tolerance)
    assert got.loss.shape == ()
    assert_same_grads(learner.model, model, tolerance)


@pytest.mark.parametrize("samples", [2, 9])  # fewer than classes, and more
@pytest.mark.parametrize("loss", ["bce", "ce", "mse", "hinge"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_those_of_two_literal_passes(net: str, loss: str, samples: int) -> None:
    """P2, P3, P5, P6, P8: three layers, pooling, dropout, three channels."""
    make, make_batch = NETS[net]
    compare(lambda: make(dropout=0.4), make_batch(samples), loss=loss)


@pytest.mark.parametrize("samples", [2, 9])
@pytest.mark.parametrize("presynaptic", ["modulated", "standard"])
@pytest.mark.parametrize("output_error", ["first", "second"])
@pytest.mark.parametrize("net", NETS)
def test_every_option(net: str, output_error: str, presynaptic: str, samples: int) -> None:
    """P1, P10."""
    make, make_batch = NETS[net]
    compare(make, make_batch(samples), presynaptic=presynaptic, output_error=output_error)


@pytest.mark.parametrize("space", ["sqrt", "sum"])
def test_every_factor_of_a_convolution(space: str) -> None:
    compare(conv, conv_batch(9), space=space)


def test_float32() -> None:
    """P3: the literal passes lose the digits, not the difference form."""
    for make, make_batch in NETS.values():
        x, y = make_batch(9)
        learner = bpfree.PEPITA(make(dtype=torch.float32), input_shape=x.shape[1:])
        model = make(dtype=torch.float32).double()
        learner.grads(x.float(), y)
        feedback = {"input": learner.feedback["input"].double()}
        PlainPEPITA(model, feedback, torch.optim.SGD(model.parameters(), lr=0.1)).backward(
            x.float().double(), y
        )
        for p, q in zip(learner.model.parameters(), model.parameters(), strict=True):
            largest = q.grad.abs().max().item()
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("output_error", ["first", "second"])
@pytest.mark.parametrize("widths", [(7, 30, 3), (7, 20, 10, 3), (7, 3)])
def test_gradients_are_the_equations(widths: tuple[int, ...], output_error: str) -> None:
    """P1, P7, P8: (h − h′)ᵀ h′ / N with units that switch, and eᵀ h′ / N at the output."""
    model = relu_net(*widths)
    learner = bpfree.PEPITA(model, feedback_scale=1.0, output_error=output_error)
    x, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 2, 2, 0, 2])
    learner.grads(x, y)

    weights = [p.detach().numpy() for p in model.parameters()]
    target = numpy.eye(3)[y.numpy()]
    h, logits = passes(weights, x.numpy())
    error = softmax(logits) - target
    h2, logits2 = passes(weights, x.numpy() + error @ learner.feedback["input"].numpy().T)
    if output_error == "second":
        error = softmax(logits2) - target
    wanted = [(h[layer + 1] - h2[layer + 1]).T @ h2[layer] / 5 for layer in range(len(weights) - 1)]
    wanted.append(error.T @ h2[-1] / 5)
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        numpy.testing.assert_allclose(parameter.grad, grad, rtol=1e-11, atol=1e-14)
    for one, other in zip(h[1:], h2[1:], strict=True):
        switched = (one > 0) != (other > 0)
        assert 0 < switched.sum() < switched.size / 2


@pytest.mark.parametrize(("space", "factor"), [("mean", 12), ("sqrt", math.sqrt(12)), ("sum", 1)])
@pytest.mark.parametrize("samples", [2, 7])
def test_convolution_gradients_are_the_equations(samples: int, space: str, factor: float) -> None:
    """P5, P6: patches of x + F e as CHW images, over the map before pooling; the sign of FC layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(10, 3)
    ).double()
    learner = bpfree.PEPITA(model, feedback_scale=1.0, space=space)
    x, y = torch.randn(samples, 2, 5, 6, dtype=torch.float64), torch.arange(samples) % 3
    with torch.no_grad():
        error = model(x).softmax(1) - nn.functional.one_hot(y, 3)
    learner.grads(x, y)

    weight, bias = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    feedback = learner.feedback["input"].numpy()
    second = x.numpy().copy()
    for sample in range(samples):
        for channel in range(2):
            for row in range(5):
                for column in range(6):
                    value = channel * 30 + row * 6 + column
                    second[sample, channel, row, column] += feedback[value] @ error[sample].numpy()
    windows = numpy.lib.stride_tricks.sliding_window_view(x.numpy(), (3, 3), axis=(2, 3))
    windows2 = numpy.lib.stride_tricks.sliding_window_view(second, (3, 3), axis=(2, 3))

    def output(patches: Array) -> Array:
        z = numpy.einsum("nchwij,ocij->nohw", patches, weight) + bias[:, None, None]
        return numpy.maximum(z, 0)

    change = output(windows) - output(windows2)
    wanted = numpy.einsum("nohw,nchwij->ocij", change, windows2) / (samples * factor)
    numpy.testing.assert_allclose(model[0].weight.grad, wanted, rtol=1e-11, atol=1e-14)
    of_bias = change.sum((0, 2, 3)) / (samples * factor)
    numpy.testing.assert_allclose(model[0].bias.grad, of_bias, rtol=1e-11, atol=1e-14)


def test_the_mask_is_shared_and_counts_once() -> None:
    """P2: (h − h′) with the mask in both, not (h − h′)·mask again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 40, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 3, bias=False)
    ).double()
    learner = bpfree.PEPITA(model, feedback_scale=0.5)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 0])
    torch.manual_seed(4)
    learner.grads(x, y)
    torch.manual_seed(4)
    mask = nn.functional.dropout(torch.ones(4, 40, dtype=torch.float64), 0.5)
    w1, w2 = (p.detach() for p in model.parameters())
    h = (x @ w1.t()).relu() * mask
    error = (h @ w2.t()).softmax(1) - nn.functional.one_hot(y, 3)
    x2 = x + error @ learner.feedback["input"].t()
    h2 = (x2 @ w1.t()).relu() * mask
    wanted = (h - h2).t() @ x2 / 4
    torch.testing.assert_close(model[0].weight.grad, wanted, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(model[3].weight.grad, error.t() @ h2 / 4, rtol=1e-11, atol=1e-14)
    again = ((h - h2) * mask).t() @ x2 / 4
    assert (wanted - again).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("leading", [True, False])
def test_dropout_of_maps(leading: bool) -> None:
    """Ahead of the pooling it belongs to the convolution's output, behind it does not."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        middle = [nn.Dropout2d(0.4), nn.MaxPool2d(2)]
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), *(middle if leading else middle[::-1]),
            nn.Conv2d(8, 4, 2), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 4),
        ).double()  # fmt: skip

    compare(make, conv_batch(9))


def test_evaluation_mode_drops_nothing() -> None:
    x, y = dense_batch()
    learner, twin = bpfree.PEPITA(dense(dropout=0.5)), bpfree.PEPITA(dense())
    before = torch.get_rng_state()
    learner.eval().grads(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    twin.grads(x, y)
    assert_same_grads(learner.model, twin.model)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
        {"padding": "valid", "dilation": 2},
        {"groups": 2, "padding": (0, 2), "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [2, 6])
def test_every_kind_of_convolution(options: dict[str, Any], samples: int) -> None:
    """First and second layer; fewer samples than classes and more."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 4, **{"kernel_size": 3, **options})
        other = nn.Conv2d(4, 4, **{"kernel_size": 3, **options, "padding": 2})
        size = other(layer(torch.zeros(1, 4, 7, 6))).numel()
        return nn.Sequential(
            layer, nn.Tanh(), other, nn.ReLU(), nn.Flatten(), nn.Linear(size, 3)
        ).double()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, 7, 6, dtype=torch.float64, generator=generator)
    compare(make, (x, torch.arange(samples) % 3))


def test_modules_ahead_of_the_first_layer() -> None:
    """F has as many rows as values enter the first layer."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)
        ).double()

    compare(make, conv_batch(9))
    learner = bpfree.PEPITA(make(), input_shape=(3, 9, 8))
    assert learner.feedback["input"].shape == (3 * 4 * 4, 4)


def test_channels_last_and_strided_inputs() -> None:
    x, y = conv_batch(9)
    learners = [bpfree.PEPITA(conv(), seed=1) for _ in range(2)]
    learners[0].grads(x, y)
    learners[1].model.to(memory_format=torch.channels_last)
    learners[1].grads(x.to(memory_format=torch.channels_last), y.repeat_interleave(2)[::2])
    assert_same_grads(learners[1].model, learners[0].model, 1e-13)


@pytest.mark.parametrize("net", NETS)
def test_without_an_error_no_hidden_layer_learns(net: str) -> None:
    """P4: exactly 0."""
    make, make_batch = NETS[net]
    x, y = make_batch()
    model = make()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    learner = bpfree.PEPITA(model, loss="mse")
    learner.grads(x, torch.zeros_like(y))
    for name, parameter in model.named_parameters():
        assert parameter.grad.count_nonzero() == 0, name
    learner.grads(x, y)
    assert all(p.grad.count_nonzero() > 0 for p in model.parameters())
