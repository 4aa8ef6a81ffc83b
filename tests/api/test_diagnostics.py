"""Angle between weights and feedback, histograms of weights, and what the command line makes of them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from nets import conv, conv_batch, dense
from torch import nn
from typer.testing import CliRunner, Result

import bpfree
from bpfree.cli import app
from bpfree.diagnostics import (
    density,
    feedback_angle,
    has_feedback_angle,
    has_update_angles,
    update_angles,
    weight_histogram,
)


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def test_angle_is_that_of_the_product_of_the_weights() -> None:
    learner = bpfree.PEPITA(linear_net())
    w1, w2, w3 = (learner.model[i].weight.detach().double().numpy() for i in (0, 2, 4))
    total = w3 @ w2 @ w1
    feedback = learner.feedback["input"].double().numpy().T
    cosine = (total * feedback).sum() / numpy.linalg.norm(total) / numpy.linalg.norm(feedback)
    assert feedback_angle(learner) == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-9)


@pytest.mark.parametrize(("factor", "angle"), [(2.0, 0.0), (-0.5, 180.0)])
def test_angle_of_aligned_and_opposed_feedback(factor: float, angle: float) -> None:
    model = linear_net()
    total = model[4].weight @ model[2].weight @ model[0].weight
    learner = bpfree.PEPITA(model, feedback={"input": factor * total.detach().t()})
    assert feedback_angle(learner) == pytest.approx(angle, abs=1e-2)


def test_angle_of_a_zero_matrix_is_nan() -> None:
    learner = bpfree.PEPITA(linear_net())
    learner.feedback["input"].zero_()
    assert math.isnan(feedback_angle(learner))


def test_learners_without_an_angle() -> None:
    assert has_feedback_angle(bpfree.PEPITA(dense()))
    for learner in (bpfree.DRTP(dense()), bpfree.PEPITA(conv())):
        assert not has_feedback_angle(learner)
    with pytest.raises(ValueError, match="feedback from the output to the input, which DRTP does"):
        feedback_angle(bpfree.DRTP(dense()))
    learner = bpfree.PEPITA(conv(), input_shape=conv_batch()[0].shape[1:])
    with pytest.raises(ValueError, match=r"dense net, but layer '0\.0' is a convolution"):
        feedback_angle(learner)


def test_update_angles_are_those_of_the_gradients() -> None:
    learner = bpfree.DRTP(linear_net(), loss="ce")
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    other = bpfree.BP(linear_net(), loss="ce")
    learner.grads(x, y)
    other.grads(x, y)
    wanted = {}
    for place in (0, 2, 4):
        a, b = (m[place].weight.grad.double().numpy().ravel() for m in (learner.model, other.model))
        cosine = (a @ b) / numpy.linalg.norm(a) / numpy.linalg.norm(b)
        wanted[str(place)] = math.degrees(math.acos(min(1.0, cosine)))
    before = [p.grad.clone() for p in learner.model.parameters()]
    angles = update_angles(learner, x, y)
    assert angles == pytest.approx(wanted, abs=1e-3)
    assert angles["4"] < 1e-3  # the output layer's is backpropagation's
    assert 10 < angles["0"] < 170
    for parameter, grad in zip(learner.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_update_angles_of_a_known_turn() -> None:
    """FRFB whose feedback is W itself is backpropagation; its negative turns the lowest layer around."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    for sign, angle in ((1, 0.0), (-1, 180.0)):
        learner = bpfree.FRFB(model, loss="ce", feedback={"2": sign * model[2].weight.detach()})
        assert update_angles(learner, x, y) == pytest.approx({"0": angle, "2": 0.0}, abs=0.05)


def test_update_angles_of_what_cannot_be_compared() -> None:
    model = nn.Sequential(nn.Linear(6, 5), bpfree.nn.Signum(), nn.Linear(5, 3))
    learner = bpfree.EKDAA(model)
    assert not has_update_angles(learner)
    assert has_update_angles(bpfree.EKDAA(linear_net()))
    with pytest.raises(
        ValueError, match="update_angles needs a net that backpropagation can train"
    ):
        update_angles(learner, torch.randn(9, 6), torch.arange(9) % 3)
    model = linear_net()
    x = torch.full((9, 6), torch.nan)
    angles = update_angles(bpfree.DRTP(model, loss="ce"), x, torch.arange(9) % 3)
    assert all(math.isnan(angle) for angle in angles.values())


def test_update_angles_leave_out_what_does_not_learn() -> None:
    model = linear_net()
    model[2].requires_grad_(False)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    assert update_angles(bpfree.BP(model), x, y) == {"0": 0.0, "4": 0.0}
    model[4].weight.data.zero_()
    assert math.isnan(update_angles(bpfree.BP(model), x, y)["0"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_histogram_counts_every_weight() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.1, 0.2, 1.0], [0.9, 0.6, 0.4, torch.nan]]))
    histogram = weight_histogram(layer, bins=2)
    torch.testing.assert_close(histogram.edges, torch.tensor([0, 0.5, 1.0], dtype=torch.float64))
    assert histogram.counts.tolist() == [4, 3]
    assert (density(histogram) * 0.5).tolist() == pytest.approx([4 / 7, 3 / 7])
    per_layer = weight_histogram(bpfree.DRTP(dense()), bins=5)
    assert per_layer.keys() == {"2", "5"}
    assert per_layer["2"].counts.sum() == 12 * 7


def test_histogram_mistakes() -> None:
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        weight_histogram(nn.Linear(2, 2), bins=0)
    with pytest.raises(TypeError, match="layer or a learner, got ReLU"):
        weight_histogram(nn.ReLU())


def train(out: Path, *arguments: str) -> Result:
    tiny = ["--model", "fc1-16", "--batch-size", "100", "--device", "cpu", "--diagnostics"]
    return CliRunner().invoke(app, ["train", *tiny, "--out", str(out), *arguments])


def angles(out: Path) -> list[float]:
    history = json.loads((out / "metrics.json").read_text())["history"]
    with (out / "metrics.csv").open() as file:
        in_csv = [float(row["feedback_angle"]) for row in csv.DictReader(file)]
    in_json: list[float] = [epoch["feedback_angle"] for epoch in history]
    assert in_csv == in_json
    return in_json


def test_a_run_records_the_angle_of_each_epoch_also_when_it_is_resumed(tmp_path: Path) -> None:
    options = ["--rule", "pepita", "--lr", "0.01"]
    assert train(tmp_path / "whole", *options, "--epochs", "3").exit_code == 0
    assert train(tmp_path / "parts", *options, "--epochs", "1").exit_code == 0
    before = (tmp_path / "parts" / "diagnostics.png").read_bytes()
    resumed = train(tmp_path / "parts", *options, "--epochs", "3", "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole = angles(tmp_path / "whole")
    assert len(set(whole)) == 3
    assert angles(tmp_path / "parts") == whole
    after = (tmp_path / "parts" / "diagnostics.png").read_bytes()
    assert after.startswith(b"\x89PNG")
    assert after != before
    # The initial weights of a resumed run are those of its first start.
    assert after == (tmp_path / "whole" / "diagnostics.png").read_bytes()


def test_a_net_without_slopes_still_draws_its_weights(tmp_path: Path) -> None:
    done = train(tmp_path, "--rule", "ekdaa", "--activation", "sign", "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "diagnostics.png").exists()
    assert "angle" not in (tmp_path / "metrics.json").read_text()


def test_a_rule_without_an_angle_still_draws_its_weights(tmp_path: Path) -> None:
    done = train(tmp_path, "--rule", "drtp", "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    (epoch,) = json.loads((tmp_path / "metrics.json").read_text())["history"]
    assert "feedback_angle" not in epoch
    by_layer = [name for name in epoch if name.startswith("update_angle_")]
    assert len(by_layer) == 2
    assert epoch[by_layer[-1]] < 0.1 < epoch[by_layer[0]]
