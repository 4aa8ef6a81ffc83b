"""Weight mirroring: feedback as a product that follows the forward weights."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_close, assert_equal, conv, dense, dense_batch, snapshot
from torch import Tensor, nn

import bpfree
from bpfree import WeightMirroring, checkpoint, mirroring
from bpfree.diagnostics import feedback_angle

LAYERS = ("2", "5", "7")


def make(seed: int = 0, **options: Any) -> bpfree.PEPITA:
    model = dense(dropout=0.2)
    chosen = {"mirroring": WeightMirroring(), **options}
    return bpfree.PEPITA(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed, **chosen)


def factors(learner: bpfree.PEPITA) -> list[Tensor]:
    return [learner.feedback[name].clone() for name in LAYERS]


def projection(product: Tensor) -> Tensor:
    """−B_1 … B_L in the size of an ordinary F."""
    size = product.square().mean().sqrt()
    return -0.05 * math.sqrt(2 / product.shape[0]) * product / size


def test_feedback_is_the_product_of_one_matrix_for_each_layer() -> None:
    learner = make()
    assert learner.feedback.keys() == {"input", *LAYERS}
    b1, b2, b3 = factors(learner)
    assert [tuple(b.shape) for b in (b1, b2, b3)] == [(12, 7), (7, 5), (5, 4)]
    torch.testing.assert_close(learner.feedback["input"], projection(b1 @ b2 @ b3))
    assert learner.feedback["input"].t().is_contiguous()
    assert torch.equal(make(seed=1).feedback["2"], make(seed=1).feedback["2"])
    assert not torch.equal(make(seed=1).feedback["2"], b1)


@pytest.mark.parametrize("widths", [(), (300,), (200, 300)])
def test_the_product_deviates_like_ordinary_feedback(widths: tuple[int, ...]) -> None:
    sizes = [400, *widths, 10]
    drawn = mirroring.draw_factors(sizes, std=0.05 * math.sqrt(2 / 400), seed=0)
    assert [tuple(b.shape) for b in drawn] == list(pairwise(sizes))
    std = 0.05 * math.sqrt(2 / 400)
    assert torch.linalg.multi_dot([*drawn, torch.eye(10)]).std().item() == pytest.approx(
        std, rel=0.1
    )
    feedback = mirroring.projection({str(i): b for i, b in enumerate(drawn)}, 0.5)
    assert feedback.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-5)
    assert feedback.mean().abs() < 0.1 * feedback.std()


def test_a_step_follows_the_equation() -> None:
    """B ← (1 − decay)·B + lr·ξᵀ f(W ξ + b)/N, with the weights after the update."""
    chosen = WeightMirroring(lr=0.3, decay=0.25, noise=0.7)
    learner = make(mirroring=chosen)
    before = factors(learner)
    noise_generator = torch.Generator()
    noise_generator.set_state(learner.generators["mirroring"].get_state())
    x, y = dense_batch()
    learner.step(x, y)
    activations = (torch.tanh, lambda z: nn.functional.leaky_relu(z, 0.1), lambda z: z)
    wanted = []
    for name, old, f in zip(LAYERS, before, activations, strict=True):
        layer = learner.model[int(name)]
        noise = (0.7 * torch.randn(6, layer.in_features, generator=noise_generator)).double()
        answer = f(noise @ layer.weight.detach().t() + layer.bias.detach())
        wanted.append(0.75 * old + 0.3 * noise.t() @ answer / 6)
        torch.testing.assert_close(learner.feedback[name], wanted[-1], rtol=1e-12, atol=1e-14)
    product = projection(wanted[0] @ wanted[1] @ wanted[2])
    torch.testing.assert_close(learner.feedback["input"], product, rtol=1e-12, atol=1e-14)


def test_the_step_itself_uses_the_feedback_from_before() -> None:
    mirrored = make()
    ordinary = make(mirroring=None, feedback={"input": mirrored.feedback["input"].clone()})
    for learner in (mirrored, ordinary):
        torch.manual_seed(3)
        learner.step(*dense_batch())
    assert_close(mirrored.model, ordinary.model, 1e-14)
    assert not torch.equal(mirrored.feedback["input"], ordinary.feedback["input"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop])
def test_noise_meets_the_new_weights_on_every_path(optimizer: type) -> None:
    """With decay 1 the feedback is the answer of the weights as they are now."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    learner = bpfree.PEPITA(
        model, optimizer(model.parameters(), lr=0.5), mirroring=WeightMirroring(0.1, 1.0, 1.0)
    )
    noise_generator = torch.Generator()
    noise_generator.set_state(learner.generators["mirroring"].get_state())
    learner.step(torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3)
    noise = torch.randn(9, 5, generator=noise_generator).double()
    wanted = 0.1 * noise.t() @ (noise @ model[0].weight.detach().t()) / 9
    torch.testing.assert_close(learner.feedback["0"], wanted)
    torch.testing.assert_close(learner.feedback["input"], projection(wanted))


def test_feedback_comes_to_align_with_the_weights() -> None:
    """It converges to lr·noise²/decay · Wᵀ for a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    learner = bpfree.PEPITA(model, frozen, mirroring=WeightMirroring(lr=0.1, decay=0.01, noise=1.0))
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.arange(64) % 3
    start = feedback_angle(learner)
    for _ in range(600):
        learner.step(x, y)
    assert start < 120
    assert feedback_angle(learner) > 170
    torch.testing.assert_close(
        learner.feedback["0"], 10 * model[0].weight.detach().t(), rtol=0.2, atol=0.5
    )


def test_grads_leave_the_feedback_alone() -> None:
    learner = make()
    before, state = factors(learner), learner.generators["mirroring"].get_state()
    learner.grads(*dense_batch())
    assert all(torch.equal(a, b) for a, b in zip(factors(learner), before, strict=True))
    assert torch.equal(learner.generators["mirroring"].get_state(), state)


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    """The noise goes on where it stopped."""
    data = dense_batch(23)
    torch.manual_seed(5)
    straight = make()
    straight.fit(data, epochs=2, batch_size=4)
    torch.manual_seed(5)
    first = make()
    history = first.fit(data, epochs=1, batch_size=4)
    checkpoint.save(tmp_path / "a.pt", first, epoch=1, history=history)
    second = make(seed=9)
    start = checkpoint.restore(second, checkpoint.load(tmp_path / "a.pt"))
    second.fit(data, epochs=1, batch_size=4, start_epoch=start)
    assert_equal(second.model, snapshot(straight.model))
    for name, feedback in straight.feedback.items():
        assert torch.equal(second.feedback[name], feedback)
    assert second.feedback["input"].t().is_contiguous()
    states = [learner.generators["mirroring"].get_state() for learner in (straight, second)]
    assert torch.equal(*states)


def test_states_with_and_without_mirroring_do_not_mix() -> None:
    plain, mirrored = make(mirroring=None), make()
    before = snapshot(plain.model)
    with pytest.raises(ValueError, match="feedback has '2', but PEPITA has feedback for 'input'"):
        plain.load_state_dict(mirrored.state_dict())
    with pytest.raises(ValueError, match=r"random generators \[\], but the learner has \['mirr"):
        mirrored.load_state_dict(plain.state_dict())
    broken = mirrored.state_dict()
    broken["generators"] = {"mirroring": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="generator 'mirroring' is not one of this torch"):
        mirrored.load_state_dict(broken)
    assert_equal(plain.model, before)


def test_factors_can_be_given() -> None:
    own = torch.full((12, 7), 0.5)
    learner = make(feedback={"2": own})
    assert torch.equal(learner.feedback["2"], own.double())
    assert torch.equal(learner.feedback["5"], make().feedback["5"])
    _, b2, b3 = factors(learner)
    torch.testing.assert_close(learner.feedback["input"], projection(own.double() @ b2 @ b3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr of WeightMirroring must be positive and finite, got 0.0"),
        ({"noise": math.inf}, "noise of WeightMirroring must be positive and finite, got inf"),
        ({"decay": 1.5}, r"decay of WeightMirroring must lie in \[0, 1\], got 1.5"),
        ({"decay": math.nan}, "decay of WeightMirroring .* got nan"),
    ],
)
def test_values_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightMirroring(**values)


def test_what_cannot_be_mirrored() -> None:
    with pytest.raises(
        ValueError, match=r"mirroring needs a dense net, but layer '0\.0' is a conv"
    ):
        bpfree.PEPITA(conv(), mirroring=WeightMirroring())
    with pytest.raises(TypeError, match=r"must be a bpfree.WeightMirroring or None, got bool"):
        bpfree.PEPITA(dense(), mirroring=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="feedback of 'input' has no meaning with mirroring"):
        make(feedback={"input": torch.zeros(12, 4)})
    named = nn.Sequential()
    named.add_module("input", nn.Linear(3, 2))
    with pytest.raises(ValueError, match="mirroring needs the name 'input' for F"):
        bpfree.PEPITA(named, mirroring=WeightMirroring())
