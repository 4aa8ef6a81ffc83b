"""Random feedback: its distribution, what it depends on, and feedback that is given."""

from __future__ import annotations

import math

import pytest
import torch
from nets import conv, conv_batch, dense, dense_batch
from torch import Tensor, nn

import bpfree


def test_feedback_bounds() -> None:
    """D7: U(±√(6/n)) with n the layer's own units, O·H·W for a convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 2000), nn.Tanh(),
        nn.Linear(2000, 10),
    )  # fmt: skip
    learner = bpfree.DRTP(model, input_shape=(1, 8, 8))
    assert learner.feedback.keys() == {"0", "3"}
    for name, units in (("0", (8, 6, 6)), ("3", (2000,))):
        feedback = learner.feedback[name]
        assert feedback.shape == (10, *units)
        bound = math.sqrt(6 / math.prod(units))
        assert 0.99 * bound < feedback.abs().max() <= bound
        assert feedback.mean().abs() < 0.05 * bound
        assert feedback.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_feedback_depends_on_seed_and_position_only() -> None:
    deep = bpfree.DRTP(dense(dtype=torch.float32), seed=1).feedback
    wide = bpfree.DRTP(dense(), seed=1).feedback
    other = bpfree.DRTP(dense(), seed=2).feedback
    torch.manual_seed(99)
    shallow = bpfree.DRTP(nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 4)), seed=1).feedback
    assert torch.equal(deep["2"], shallow["0"])
    assert torch.equal(deep["2"], wide["2"].float())
    assert not torch.equal(wide["2"], other["2"])
    twins = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 4))
    first, second = bpfree.DRTP(twins, seed=1).feedback.values()
    assert torch.equal(first, deep["2"])
    assert not torch.equal(first, second)


def test_feedback_uses_no_global_random_numbers() -> None:
    model, before = conv(), torch.get_rng_state()
    bpfree.DRTP(model, input_shape=(3, 9, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_feedback_of_convolutions_waits_for_the_first_batch() -> None:
    late, early = bpfree.DRTP(conv()), bpfree.DRTP(conv(), input_shape=(3, 9, 8))
    assert late.feedback.keys() == {"3"}
    late.grads(*conv_batch())
    assert late.feedback.keys() == early.feedback.keys() == {"0.0", "0.3", "3"}
    for name, feedback in early.feedback.items():
        assert torch.equal(feedback, late.feedback[name])


def test_feedback_is_no_parameter() -> None:
    learner = bpfree.DRTP(dense())
    assert len(list(learner.model.parameters())) == 6
    assert not any(feedback.requires_grad for feedback in learner.feedback.values())


def test_feedback_can_be_given() -> None:
    own = torch.full((4, 7), 0.5)
    learner = bpfree.DRTP(dense(), feedback={"2": own})
    assert torch.equal(learner.feedback["2"], own.double())
    assert torch.equal(learner.feedback["5"], bpfree.DRTP(dense()).feedback["5"])
    x, y = dense_batch()
    learner.grads(x, y)
    hidden = torch.tanh(learner.model[2](x.flatten(1)))
    wanted = (0.5 * (1 - hidden**2)).sum(0)
    torch.testing.assert_close(learner.model[2].bias.grad, wanted.detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"3": torch.zeros(4, 7)}, "has '3', but DRTP has feedback for '2', '5'"),
        ({"7": torch.zeros(4, 4)}, "has '7'"),
        ({"2": torch.zeros(7, 4)}, r"of '2' must have shape \(4, 7\), got \(7, 4\)"),
        ({"2": torch.zeros(4, 7, 1)}, r"must have shape \(4, 7\)"),
    ],
)
def test_feedback_that_does_not_fit_is_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bpfree.DRTP(dense(), feedback=given)


def test_feedback_map_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(4, 4, any, any\)"):
        bpfree.DRTP(conv(), feedback={"0.0": torch.zeros(4, 5, 9, 8)})
    learner = bpfree.DRTP(conv(), feedback={"0.0": torch.zeros(4, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"layer '0\.0' has feedback"):
        learner.grads(*conv_batch())


def test_feedback_follows_the_model() -> None:
    learner = bpfree.DRTP(dense(dtype=torch.float32))
    learner.grads(*dense_batch(dtype=torch.float32))
    learner.model.zero_grad()
    learner.model.double()
    learner.grads(*dense_batch())
    assert {f.dtype for f in learner.feedback.values()} == {torch.float64}


def test_feedback_is_read_only() -> None:
    """A matrix of another shape could only fail in the middle of a step."""
    learner = bpfree.DRTP(dense())
    name = next(iter(learner.feedback))
    with pytest.raises(TypeError):
        learner.feedback[name] = torch.zeros(1)  # type: ignore[index]
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got list"):
        bpfree.DRTP(dense(), feedback={name: [[1.0]]})  # type: ignore[dict-item]


def test_hooks_see_real_batches_only() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    seen = []
    model[0].register_forward_hook(lambda _module, args, _out: seen.append(args[0].device.type))
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
    learner.step(torch.ones(3, 2, 2), torch.tensor([0, 1, 0]))
    assert seen == ["cpu"]
