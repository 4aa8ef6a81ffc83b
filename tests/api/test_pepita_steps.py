"""PEPITA: feedback (P9), steps by any optimizer, frozen layers, mistakes, and training (P11)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_close, assert_equal, conv, conv_batch, dense, dense_batch, snapshot
from pepita_equations import NETS, assert_same_grads, plain_twin
from torch import nn

import bpfree
import bpfree_kernels
from bpfree import data
from bpfree.diagnostics import feedback_angle
from bpfree.models import build_model

# Feedback


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_feedback_bounds(scale: float) -> None:
    """P9: U(±scale·√(6/n)), n the values that enter the first layer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))
    feedback = bpfree.PEPITA(model, feedback_scale=scale).feedback["input"]
    bound = scale * math.sqrt(6 / 784)
    assert feedback.shape == (784, 10)
    assert 0.99 * bound < feedback.abs().max() <= bound
    assert feedback.mean().abs() < 0.05 * bound
    assert feedback.std().item() == pytest.approx(scale * math.sqrt(2 / 784), rel=0.03)


def test_feedback_depends_on_the_seed_only() -> None:
    models, maps = [dense(seed=0), dense(seed=5)], conv()
    before = torch.get_rng_state()
    first, same = (bpfree.PEPITA(model, seed=1) for model in models)
    other = bpfree.PEPITA(models[0], seed=2)
    assert torch.equal(first.feedback["input"], same.feedback["input"])
    assert not torch.equal(first.feedback["input"], other.feedback["input"])
    early, late = bpfree.PEPITA(maps, seed=4, input_shape=(3, 9, 8)), bpfree.PEPITA(maps, seed=4)
    assert not late.feedback
    late.grads(*conv_batch())
    assert torch.equal(late.feedback["input"], early.feedback["input"])
    assert torch.equal(torch.get_rng_state(), before)


def test_feedback_lies_as_the_ops_want_it() -> None:
    own = torch.randn(12, 4)
    learner = bpfree.PEPITA(dense(), feedback={"input": own})
    other = bpfree.PEPITA(dense(), seed=7)
    other.load_state_dict(learner.state_dict())
    moved = bpfree.PEPITA(dense(dtype=torch.float32))
    moved.model.double()
    moved.grads(*dense_batch())
    for feedback in (x.feedback["input"] for x in (learner, other, moved)):
        assert feedback.dtype == torch.float64
        assert feedback.t().is_contiguous()
    assert torch.equal(learner.feedback["input"], own.double())
    assert torch.equal(other.feedback["input"], own.double())
    other.feedback["input"].zero_()
    assert learner.feedback["input"].abs().max() > 0


# Steps


@pytest.mark.parametrize("net", NETS)
def test_a_step_lowers_every_parameter_by_lr_times_its_gradient(net: str) -> None:
    make, make_batch = NETS[net]
    model = make()
    learner = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.25), feedback_scale=1.0)
    x, y = make_batch()
    before = learner.grads(x, y)
    wanted = {n: p.detach() - 0.25 * p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    result = learner.step(x, y)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-12, atol=1e-14)
        assert parameter.grad is None
    torch.testing.assert_close(result.loss, before.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(result.output, before.output, rtol=1e-14, atol=0)


@pytest.mark.parametrize("output_error", ["first", "second"])
@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.RMSprop(p, lr=0.01),
])  # fmt: skip
@pytest.mark.parametrize("net", NETS)
def test_any_optimizer(net: str, make_optimizer: Callable[..., Any], output_error: str) -> None:
    """Inside the kernels and by ``optimizer.step()`` alike, over some steps."""
    make, make_batch = NETS[net]
    x, y = make_batch(9)
    models = [make(), make()]
    learner, by_hand = (
        bpfree.PEPITA(m, make_optimizer(m.parameters()), output_error=output_error) for m in models
    )
    for _ in range(3):
        learner.step(x, y)
        by_hand.optimizer.zero_grad()
        by_hand.grads(x, y)
        by_hand.optimizer.step()
    assert_close(models[0], models[1], 1e-9)


def test_plain_pepita_steps() -> None:
    x, y = conv_batch()
    learner = bpfree.PEPITA(conv(), input_shape=x.shape[1:])
    model = conv()
    learner.grads(x, y)
    plain_twin(learner, model, lr=0.5).step(x, y)
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs.detach(), (ours - 0.5 * ours.grad).detach())


@pytest.mark.parametrize("how", ["requires_grad", "left out of the optimizer"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("samples", [2, 9])
@pytest.mark.parametrize("net", NETS)
def test_frozen_layers_pass_the_difference_on(
    net: str, samples: int, position: int, how: str
) -> None:
    """With the mask of the dropout behind them."""
    make, make_batch = NETS[net]
    x, y = make_batch(samples)
    model, reference = make(dropout=0.4), make(dropout=0.4)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    frozen = list(layers[position].parameters())
    learning = [p for p in model.parameters() if all(p is not q for q in frozen)]
    if how == "requires_grad":
        for parameter in frozen:
            parameter.requires_grad_(False)
        learning = list(model.parameters())
    before = snapshot(model)
    learner = bpfree.PEPITA(model, torch.optim.SGD(learning, lr=0.5))
    everything = bpfree.PEPITA(reference, torch.optim.SGD(reference.parameters(), lr=0.5))
    for one in (learner, everything):
        torch.manual_seed(6)
        one.step(x, y)
    for name, parameter in model.named_parameters():
        if any(parameter is p for p in frozen):
            assert torch.equal(parameter, before[name]), name
        else:
            torch.testing.assert_close(
                parameter, reference.get_parameter(name), rtol=1e-12, atol=1e-13
            )
            assert not torch.equal(parameter, before[name]), name


def test_a_frozen_weight_with_a_learning_bias() -> None:
    for make, make_batch in NETS.values():
        model = make()
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        for weight in weights:
            weight.requires_grad_(False)
        before = snapshot(model)
        learner = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1))
        learner.step(*make_batch())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == name.endswith("weight"), name


def test_grads_accumulate_and_change_no_parameter() -> None:
    x, y = conv_batch()
    learner = bpfree.PEPITA(conv())
    before = snapshot(learner.model)
    learner.grads(x, y)
    once = [p.grad.clone() for p in learner.model.parameters()]
    learner.grads(x, y)
    for parameter, grad in zip(learner.model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-14, atol=0)
    assert_equal(learner.model, before)


@pytest.mark.parametrize("net", NETS)
def test_the_reference_backend_agrees(net: str) -> None:
    make, make_batch = NETS[net]
    models = [make(), make()]
    for model, backend in zip(models, (None, "reference"), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        learner = bpfree.PEPITA(model, optimizer, backend=backend)
        learner.step(*make_batch())
    assert_close(*models, 1e-10)


def test_batches_of_every_size_and_labels_of_both_kinds() -> None:
    model = dense()
    learner = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for samples in (1, 3, 17):
        x, y = dense_batch(samples)
        assert learner.step(x, y.int()).output.shape == (samples, 4)


def test_frozen_convolutions_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from bpfree.rules._products import ConvolutionProducts

    model = conv()
    model[0].requires_grad_(False)
    monkeypatch.setattr(ConvolutionProducts, "gradients", None)
    learner = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1))
    learner.step(*conv_batch())


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback_scale": 0.0}, "feedback_scale must be positive and finite, got 0.0"),
        ({"feedback_scale": math.nan}, "feedback_scale .* got nan"),
        ({"presynaptic": "first"}, "presynaptic must be one of modulated, standard, got 'first'"),
        ({"output_error": "both"}, "output_error must be one of first, second, got 'both'"),
        ({"space": "max"}, "space must be one of mean, sqrt, sum, got 'max'"),
        ({"loss": "nll"}, "loss must be one of ce, bce, mse, hinge, got 'nll'"),
        ({"feedback": {"2": torch.zeros(12, 4)}}, "has '2', but PEPITA has feedback for 'input'"),
        ({"feedback": {"input": torch.zeros(4, 12)}}, r"must have shape \(12, 4\), got \(4, 12\)"),
        ({"input_shape": (13,)}, "layer '2'.*12 features.*13"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bpfree.PEPITA(dense(), **options)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x, y: (x, y.fill_(4)), IndexError, r"\[0, 4\), got 4 at position 0"),
        (lambda x, y: (x, y[:-1]), ValueError, r"\(6,\), got \(5,\)"),
        (lambda x, y: (x.float(), y), TypeError, "x must have the dtype .*float64"),
        (lambda x, y: (x[:, :, :3], y), ValueError, "layer '2'.*12 features.*9"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "at least one sample"),
    ],
)
def test_errors_change_nothing(
    spoil: Callable[..., Any], error: type[Exception], message: str
) -> None:
    for options in ({}, {"time_local": True}, {"mirroring": bpfree.WeightMirroring()}):
        model = dense()
        learner = bpfree.PEPITA(model, torch.optim.Adam(model.parameters()), **options)
        before, feedback = snapshot(model), learner.feedback["input"].clone()
        with pytest.raises(error, match=message):
            learner.step(*spoil(*dense_batch()))
        assert_equal(model, before)
        assert torch.equal(learner.feedback["input"], feedback)
        assert not learner.optimizer.state
        learner.step(*dense_batch())


def test_images_of_another_size() -> None:
    model = conv()
    learner = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = conv_batch()
    learner.step(x, y)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'input' is for 216 values, but with this x 243 enter"):
        learner.step(torch.cat([x, x[..., :1]], 3), y)
    assert_equal(model, before)
    learner.step(x, y)


def test_explain_names_the_path_of_every_layer() -> None:
    model = conv()
    text = bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1)).explain().splitlines()
    assert "PEPITA, loss ce" in text[0]
    assert text[1].endswith("(a convolution's is a sum of two)")
    assert text[3].endswith("fused with SGD")


def test_gradient_scale_is_public() -> None:
    _, y = dense_batch()
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for loss in bpfree.LOSSES:
        (wanted,) = torch.autograd.grad(bpfree.losses.batch_loss(z, y, loss), z)
        eye = torch.eye(4, dtype=torch.float64)
        error = bpfree_kernels.classifier_forward(z, eye, None, y, loss=loss).error
        got = error * bpfree_kernels.gradient_scale(loss, 6, 4)
        torch.testing.assert_close(got, wanted, msg=loss)
    with pytest.raises(ValueError, match="loss must be one of"):
        bpfree_kernels.gradient_scale("nll", 6, 4)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        bpfree_kernels.gradient_scale("ce", 0, 4)


# Training


def train(rule: type[bpfree.Learner], lr: float, **options: Any) -> tuple[Any, float, float]:
    """The learner, its test accuracy on digits, and how far its hidden layer moved."""
    digits = data.load("digits")
    model = build_model("fc1-32", digits.input_shape, 10, "relu", bias=False, init="he")
    start = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    learner = rule(model, optimizer, loss="ce", **options)
    learner.fit((digits.train_x, digits.train_y), 25, 64)
    accuracy = learner.evaluate((digits.test_x, digits.test_y)).accuracy
    moved = (model[1].weight.detach() - start).norm() / start.norm()
    return learner, accuracy, moved.item()


def test_training_beats_the_frozen_control_and_turns_the_weights_against_the_feedback() -> None:
    """P11, and the canary: a hidden layer that does not learn cannot pass."""
    learner, accuracy, moved = train(bpfree.PEPITA, 0.1, feedback_scale=0.2)
    _, control, still = train(bpfree.Shallow, 0.1)
    assert still == 0
    assert 0.2 < moved < 2
    assert accuracy > 0.93
    assert control < 0.9
    assert feedback_angle(learner) > 100


def test_the_time_local_variant_learns_too() -> None:
    learner, accuracy, moved = train(bpfree.PEPITA, 0.01, time_local=True, feedback_scale=0.5)
    _, control, _ = train(bpfree.Shallow, 0.01)
    assert 0.2 < moved < 3
    assert accuracy > max(0.85, control + 0.05)
    assert feedback_angle(learner) > 110


def test_a_convolution_without_activation_keeps_its_output() -> None:
    """Δy must not take the place of z where z is the output that pooling and the next layer read."""

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(12, 5),
        ).double()  # fmt: skip

    x, y = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.arange(7) % 5
    model, plain_model = net(), net()
    learner = bpfree.PEPITA(model, seed=3, input_shape=x.shape[1:])
    learner.grads(x, y)
    plain_twin(learner, plain_model).backward(x, y)
    assert_same_grads(model, plain_model)
