"""Feedback weights R as tensors that learn: with the optimizer, under masks, moved, copied and saved."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from feedback_layers import MODES, batch, each_kind, layers, network, of_kind
from torch import nn

import bpfree
from bpfree.nn import FeedbackConv2d, FeedbackLinear, FeedbackLocallyConnected2d, feedback_weights

OPTIMIZERS = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.05),
    "momentum": lambda tensors: torch.optim.SGD(tensors, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda tensors: torch.optim.Adam(tensors, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_difference_of_weight_and_feedback_is_constant(optimizer: str) -> None:
    """U2, over 100 steps."""
    model = network()
    updater = OPTIMIZERS[optimizer]([*model.parameters(), *feedback_weights(model)])
    before = [(m.weight - m.feedback).detach().clone() for m in layers(model)]
    start = [m.feedback.detach().clone() for m in layers(model)]
    x, y = batch()
    losses = []
    for _ in range(100):
        updater.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        updater.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for layer, difference, feedback in zip(layers(model), before, start, strict=True):
        assert (layer.feedback - feedback).abs().max() > 1e-2
        assert (layer.weight - layer.feedback - difference).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["fixed", "sign"])
def test_feedback_that_does_not_learn(mode: str) -> None:
    """U9: bit for bit the same."""
    model = network(mode=mode)
    assert list(feedback_weights(model)) == []
    before = [m.feedback.clone() for m in layers(model)]
    weights = [m.weight.detach().clone() for m in layers(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for layer, feedback, weight in zip(layers(model), before, weights, strict=True):
        assert torch.equal(layer.feedback, feedback)
        assert not torch.equal(layer.weight, weight)


def test_gradients_accumulate_until_the_optimizer_clears_them() -> None:
    model = network()
    optimizer = torch.optim.SGD([*model.parameters(), *feedback_weights(model)], lr=0.1)
    x, y = batch()
    once = []
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        once.append([r.grad.clone() for r in feedback_weights(model)])
    for single, double in zip(*once, strict=True):
        torch.testing.assert_close(double, 2 * single)
    optimizer.zero_grad()
    assert all(r.grad is None for r in feedback_weights(model))


@each_kind
def test_frozen_weight_freezes_its_feedback(kind: str) -> None:
    make, x = of_kind(kind)
    layer = make(dtype=torch.float64).requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.feedback.grad is None
    assert x.grad.count_nonzero() > 0


@each_kind
def test_masks(kind: str) -> None:
    """U7: W and R with masks of their own; absent stays 0; a live 0.0 goes on learning."""
    make, x = of_kind(kind)
    shape = make().weight
    weight_mask, feedback_mask = (bpfree.nn.random_connectivity(shape, 0.5) for _ in range(2))
    layer = make(weight_mask=weight_mask, feedback_mask=feedback_mask, dtype=torch.float64)
    assert torch.equal(layer.weight != 0, weight_mask)
    assert torch.equal(layer.feedback != 0, feedback_mask)
    with torch.no_grad():
        layer.weight.zero_()
        layer.feedback.zero_()
    layer(x).square().sum().backward()
    free = make(dtype=torch.float64)
    free.load_state_dict(layer.state_dict(), strict=False)
    free(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, free.weight.grad * weight_mask)
    assert torch.equal(layer.feedback.grad, free.weight.grad * feedback_mask)
    optimizer = torch.optim.Adam([*layer.parameters(), *feedback_weights(layer)], lr=0.1)
    optimizer.step()
    reached = free.weight.grad != 0
    assert torch.equal(layer.weight != 0, weight_mask & reached)
    assert torch.equal(layer.feedback != 0, feedback_mask & reached)
    layer.reset_parameters()
    assert torch.equal(layer.weight != 0, weight_mask)
    assert torch.equal(layer.feedback != 0, feedback_mask)
    assert {"feedback", "weight_mask", "feedback_mask"} <= layer.state_dict().keys()


@each_kind
def test_mask_of_the_weight_alone(kind: str) -> None:
    make, x = of_kind(kind)
    mask = bpfree.nn.random_connectivity(make().weight, 0.5)
    layer = make(mode="fixed", weight_mask=mask, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.weight.grad[~mask].count_nonzero() == 0
    assert layer.weight.grad[mask].count_nonzero() > 0


def test_feedback_is_drawn_by_glorot() -> None:
    """U(±√(6/(k·k·(in + out)))), independent of W; W and bias as the ordinary layer's."""
    made = {
        FeedbackLinear(300, 200): 500,
        FeedbackConv2d(60, 40, 3): 900,
        FeedbackConv2d(60, 40, 3, groups=2): 630,
        FeedbackLocallyConnected2d(6, 4, 3, groups=2, input_size=12): 63,
    }
    for layer, fans in made.items():
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < layer.feedback.abs().max() <= bound
        assert layer.feedback.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        both = torch.stack((layer.feedback.detach().flatten(), layer.weight.detach().flatten()))
        assert torch.corrcoef(both)[0, 1].abs() < 0.03
    torch.manual_seed(4)
    plain = nn.Linear(3, 2)
    torch.manual_seed(4)
    assert torch.equal(FeedbackLinear(3, 2).weight, plain.weight)


def test_feedback_is_a_buffer() -> None:
    model = network()
    assert not any("feedback" in name for name, _ in model.named_parameters())
    assert [n for n, _ in model.named_buffers()] == ["0.feedback", "2.feedback", "5.feedback"]
    assert [id(r) for r in feedback_weights(model)] == [id(m.feedback) for m in layers(model)]


def test_copies_and_checkpoints() -> None:
    model = network()
    twin = copy.deepcopy(model)
    for ours, theirs in zip(feedback_weights(model), feedback_weights(twin), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert theirs.requires_grad
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    for assign in (False, True):
        other = network()
        for layer in layers(other):
            layer.reset_parameters()
        assert not torch.equal(other[5].feedback, model[5].feedback)
        other.load_state_dict(state, assign=assign)
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
        x, y = batch()
        F.cross_entropy(other(x), y).backward()
        for layer, original in zip(layers(other), layers(model), strict=True):
            assert torch.equal(layer.feedback, original.feedback)
            assert torch.equal(layer.feedback.grad, layer.weight.grad)


def test_moving_keeps_what_the_optimizer_holds() -> None:
    model = network(torch.float32)
    held = list(feedback_weights(model))
    optimizer = torch.optim.SGD([*model.parameters(), *held], lr=0.1)
    x, y = batch()
    F.cross_entropy(model(x.float()), y).backward()
    model.double()
    assert all(a is b for a, b in zip(held, feedback_weights(model), strict=True))
    assert all(r.dtype == r.grad.dtype == torch.float64 for r in held)
    before = [r.detach().clone() for r in held]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not any(torch.equal(r, old) for r, old in zip(held, before, strict=True))
    assert model.to("meta")[0].feedback.is_meta


def test_lazy_layer() -> None:
    layer = FeedbackLocallyConnected2d(2, 3, 3, mode="updated")
    twin = copy.deepcopy(layer).double()
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.feedback.grad, layer.weight.grad)
    assert layer.feedback.std() > 0
    twin.load_state_dict(layer.state_dict())
    assert twin.feedback.dtype == torch.float64
    torch.testing.assert_close(twin(x.double()).float(), layer(x))
    assert [r is twin.feedback for r in feedback_weights(twin)] == [True]


def test_untie_takes_the_feedback_along() -> None:
    torch.manual_seed(5)
    shape = FeedbackConv2d(2, 3, 3).weight
    masks = {
        f"{name}_mask": bpfree.nn.random_connectivity(shape, 0.5) for name in ("weight", "feedback")
    }
    for mode in MODES:
        tied = nn.Sequential(FeedbackConv2d(2, 3, 3, mode=mode, **masks)).double()
        untied = copy.deepcopy(tied)
        assert bpfree.nn.untie(untied, (2, 6, 5)) == ["0"]
        inputs = [torch.ones(2, 2, 6, 5).double().cumsum(-1).requires_grad_() for _ in range(2)]
        for model, x in zip((tied, untied), inputs, strict=True):
            model(x).square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        names = ("weight", "feedback") if mode == "updated" else ("weight",)
        for name in names:
            one, many = getattr(tied[0], name).grad, getattr(untied[0], name).grad
            torch.testing.assert_close(many.sum((0, 1)).permute(3, 2, 0, 1), one)
        assert untied[0].mode == mode
    with pytest.raises(TypeError, match="conv must be a FeedbackConv2d"):
        FeedbackLocallyConnected2d.from_conv2d(nn.Conv2d(2, 3, 3), 5)


@each_kind
@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (
            ValueError,
            {"mode": "learned"},
            "mode must be one of updated, fixed, sign, got 'learned'",
        ),
        (TypeError, {"weight_mask": "float"}, "weight_mask must be torch.bool"),
        (ValueError, {"feedback_mask": "small"}, "feedback_mask must have shape"),
    ],
)
def test_wrong_arguments(
    kind: str, error: type[Exception], options: dict[str, str], message: str
) -> None:
    make, _ = of_kind(kind)
    made = {"float": torch.ones_like(make().weight), "small": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        make(**{name: made.get(value, value) for name, value in options.items()})


def test_lazy_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="masks need input_size"):
        FeedbackLocallyConnected2d(1, 1, 3, feedback_mask=torch.ones(1).bool())
