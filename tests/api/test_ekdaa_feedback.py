"""EKDAA's error kernels, their state, and what the learner takes and refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_equal, snapshot
from test_ekdaa_learner import OPTIMIZERS, batch, dense, make, pooled
from torch import nn

import bpfree
from bpfree import checkpoint
from bpfree.nn import Signum


def test_grads_leave_the_feedback() -> None:
    model = make(dropout=0.0)
    learner = bpfree.EKDAA(model, OPTIMIZERS["adam"](model))
    before, weights = {n: e.clone() for n, e in learner.feedback.items()}, snapshot(model)
    learner.grads(*batch())
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    learner.grads(*batch())
    assert_equal(model, weights)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-13, atol=0)
    assert all(torch.equal(e, before[n]) for n, e in learner.feedback.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_layers_keep_weight_and_feedback(optimizer: str) -> None:
    """A frozen layer in the middle still hands errors down; below the first that learns nothing runs."""
    model, whole = make(dropout=0.0), make(dropout=0.0)
    for place in (0, 8):
        model[place].requires_grad_(False)
    learner = bpfree.EKDAA(model, OPTIMIZERS[optimizer](model))
    everything = bpfree.EKDAA(whole, OPTIMIZERS[optimizer](whole))
    frozen, before = learner.feedback["8"].clone(), snapshot(model)
    for one in (learner, everything):
        one.step(*batch())
    assert torch.equal(learner.feedback["8"], frozen)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("0", "8"):
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, whole.get_parameter(name), rtol=1e-13, atol=1e-14)
    for name in ("3", "6", "14", "16", "19"):
        torch.testing.assert_close(
            learner.feedback[name], everything.feedback[name], rtol=1e-13, atol=1e-14
        )


def test_feedback_is_that_of_urfb() -> None:
    """Glorot-uniform in W's layout, of seed and position alone; given feedback is taken instead."""
    model = make()
    learner, others = bpfree.EKDAA(model, seed=5), bpfree.URFB(pooled(), seed=5)
    assert list(learner.feedback) == ["3", "6", "8", "14", "16", "19"]
    for name, feedback in learner.feedback.items():
        assert feedback.shape == model.get_parameter(f"{name}.weight").shape
    for name, feedback in bpfree.EKDAA(pooled(), seed=5).feedback.items():
        assert torch.equal(feedback, others.feedback[name])
    own = torch.full((7, 4), 0.5)
    assert torch.equal(bpfree.EKDAA(make(), feedback={"14": own}).feedback["14"], own.double())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_learner_goes_on_as_the_saved_one(optimizer: str, tmp_path: Path) -> None:
    model, other = make(), make()
    saved = bpfree.EKDAA(model, OPTIMIZERS[optimizer](model), seed=1)
    restored = bpfree.EKDAA(other, OPTIMIZERS[optimizer](other), seed=2)
    restored.step(*batch())
    for _ in range(2):
        saved.step(*batch())
    checkpoint.save(tmp_path / "run.pt", saved, epoch=1)
    for learner in (saved, restored):
        checkpoint.restore(learner, checkpoint.load(tmp_path / "run.pt"))
        for _ in range(2):
            learner.step(*batch())
    assert_equal(other, snapshot(model))
    for kept in ("feedback", "buffers"):
        ours, theirs = getattr(restored, kept), getattr(saved, kept)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert bool(saved.buffers) == (optimizer != "sgd")


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = make()
    learner = bpfree.EKDAA(model, OPTIMIZERS["momentum"](model))
    learner.step(*batch())
    state = copy.deepcopy(learner.state_dict())
    state["buffers"]["feedback_m.3"] = torch.zeros(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'feedback_m.3' of the state must have shape \(6, 2"):
        learner.load_state_dict(state)
    assert_equal(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": math.nan}, ValueError, "beta must be finite, got nan"),
        ({"gamma": math.inf}, ValueError, "gamma must be finite, got inf"),
        ({"upsample": "cubic"}, ValueError, "upsample must be one of 'argmax'.* got 'cubic'"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'sum', 'mean', got 'none'"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive and finite, got 0.0"),
        (
            {"upsample": "bilinear", "backend": "triton"},
            ValueError,
            "backend must be 'reference' for upsample 'bilinear', got 'triton'",
        ),
        ({"feedback": {"0": torch.zeros(1)}}, ValueError, "'0', but EKDAA has feedback for '3'"),
        ({"input_shape": (2, 5, 30)}, ValueError, "layer '14'"),
        ({"loss": "l1"}, ValueError, "loss must be one of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        bpfree.EKDAA(model, **options)
    assert_equal(model, before)


@pytest.mark.parametrize("between", [nn.Dropout(0.2), nn.AvgPool2d(1), nn.MaxPool2d(2)])
def test_a_pooling_away_from_its_activation_is_passed_to_the_winners_alone(
    between: nn.Module,
) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), between, nn.Sequential(nn.MaxPool2d(2))
    head = nn.Flatten(), nn.LazyLinear(3)
    model = nn.Sequential(*body, *head).eval()
    model(torch.zeros(1, 1, 8, 8))
    bpfree.EKDAA(model, input_shape=(1, 8, 8))
    for upsample in ("nearest", "average", "bilinear"):
        with pytest.raises(ValueError, match=rf"upsample '{upsample}' .* module '3.0' \(MaxPool2d"):
            bpfree.EKDAA(model, upsample=upsample)


def test_locally_connected_layers_are_refused() -> None:
    model = nn.Sequential(
        bpfree.nn.LocallyConnected2d(1, 2, 3, input_size=(4, 4)), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    with pytest.raises(TypeError, match="EKDAA trains Linear, Conv2d, but layer '0' is a Locally"):
        bpfree.EKDAA(model)


@pytest.mark.parametrize("rule", [bpfree.BP, bpfree.DRTP, bpfree.URFB, bpfree.FRFB])
def test_rules_that_need_a_derivative_refuse_signum(rule: type[bpfree.Learner]) -> None:
    with pytest.raises(ValueError, match=rf"{rule.__name__} needs .* Signum behind layer '1' is 0"):
        rule(dense(Signum))


@pytest.mark.parametrize("rule", [bpfree.EKDAA, bpfree.PEPITA, bpfree.Shallow])
def test_rules_without_derivatives_take_signum(rule: type[bpfree.Learner]) -> None:
    model = dense(Signum)
    learner = rule(model, OPTIMIZERS["sgd"](model))
    before = snapshot(model)
    learner.step(*batch())
    assert not torch.equal(model[5].weight, before["5.weight"])
    if rule is bpfree.EKDAA:
        assert not torch.equal(model[3].weight, before["3.weight"])


def test_a_model_of_one_layer_has_no_feedback() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
    learner = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model))
    first, second = (learner.step(*batch()).loss for _ in range(2))
    assert second < first
    assert learner.feedback == {}


def test_explains_itself() -> None:
    model = make()
    lines = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model)).explain().splitlines()
    assert lines[0].startswith("EKDAA, loss ce")
    assert lines[1].endswith("fused with SGD")
    ops = [line.rpartition(" ")[2] for line in lines[2:]]
    assert ops == [
        "ekdaa_conv_error", "ekdaa_error", "ekdaa_conv_error", "ekdaa_error",
        "ekdaa_linear_error", "ekdaa_error",
    ]  # fmt: skip
    assert "fused with SGD; its error kernel learns 0.1 times the same" in lines[2]
    apart = bpfree.EKDAA(model, OPTIMIZERS["sgd"](model), max_norm=1.0, gamma=0.0).explain()
    assert apart.count("gradient, then SGD by apply_update (its length has to be known") == 7
    assert apart.count("its error kernel stays as it is") == 6
