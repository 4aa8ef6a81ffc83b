"""The multi-class hinge loss: the module, and learners that take it by name or as a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_equal, conv, conv_batch, dense, dense_batch, hinge, snapshot
from torch import Tensor, nn

import bpfree
import bpfree_kernels
from bpfree import checkpoint, data
from bpfree.models import build_model
from bpfree.nn import MultiClassHingeLoss
from bpfree.plain import PlainPEPITA

RULES = (bpfree.BP, bpfree.DRTP, bpfree.PEPITA, bpfree.Shallow)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"margin": 0.4},
    {"off_class": 0.7},
    {"margin": 2, "off_class": 0},
]


def random_logits(classes: int, samples: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = 2 * torch.randn(samples, classes, dtype=torch.float64, generator=generator)
    return z.requires_grad_(), torch.arange(samples) * 7 % classes


# The module


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_away_from_the_thresholds_it_is_a_sum_of_relus(
    classes: int, options: dict[str, Any]
) -> None:
    z, y = random_logits(classes)
    wanted = hinge(z, y, **options)
    for labels in (y, y.int()):
        got = MultiClassHingeLoss(**options, reduction="none")(z, labels)
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    for reduction in ("mean", "sum"):
        value = MultiClassHingeLoss(**options, reduction=reduction)(z, y)
        torch.testing.assert_close(value, getattr(wanted, reduction)(), rtol=1e-14, atol=0)
        (got,) = torch.autograd.grad(value, z)
        (by_relu,) = torch.autograd.grad(getattr(hinge(z, y, **options), reduction)(), z)
        assert got.count_nonzero() > 0
        torch.testing.assert_close(got, by_relu, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_the_thresholds_its_gradient_is_the_ops(
    options: dict[str, Any], compiled: bool, dtype: torch.dtype
) -> None:
    """U4: a logit of exactly ±margin keeps its gradient, unlike by relu."""
    margin = options.get("margin", 1.0)
    z = torch.tensor([[1, -1, 1], [-1, 1, 0], [0, 1, 1], [-1, -1, 1]], dtype=dtype) * margin
    y = torch.tensor([0, 1, 2, 2])
    op = bpfree_kernels.classifier_forward(
        z, torch.eye(3, dtype=dtype), None, y, loss="hinge", **options
    )
    module: Callable[..., Tensor] = MultiClassHingeLoss(**options)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss = module(z.requires_grad_(), y)
    (got,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(got, op.error / 4)
    torch.testing.assert_close(loss.detach(), op.loss.mean())
    (by_relu,) = torch.autograd.grad(hinge(z, y, **options).mean(), z)
    assert (got - by_relu).count_nonzero() > 0


def test_low_precision_and_strided_logits() -> None:
    z, y = random_logits(10)
    wide = MultiClassHingeLoss()(z, y)
    for narrow in (torch.bfloat16, torch.float16):
        loss = MultiClassHingeLoss()(z.to(narrow), y)
        assert loss.dtype == narrow
        torch.testing.assert_close(loss.double(), wide, rtol=0.01, atol=0)
    strided = torch.stack((z, -z), 2)[..., 0]
    assert torch.equal(MultiClassHingeLoss()(strided, torch.stack((y, y), 1)[:, 0]), wide)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MultiClassHingeLoss(margin=-1.0),
            "margin must be finite and not negative, got -1.0",
        ),
        (
            lambda: MultiClassHingeLoss(off_class=float("inf")),
            "off_class must be finite .* got inf",
        ),
        (lambda: MultiClassHingeLoss(reduction="max"), "reduction must be one of mean, sum, none"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda z, y: (z[0], y),
            ValueError,
            r"input must have shape \[batch, classes\], got \(4,\)",
        ),
        (
            lambda z, y: (z[:, :0], y),
            ValueError,
            r"input must hold at least one class, got \(9, 0\)",
        ),
        (lambda z, y: (z.long(), y), TypeError, "input must be of a floating-point .* torch.int64"),
        (lambda z, y: (z.tolist(), y), TypeError, "input must be a torch.Tensor, got list"),
        (lambda z, y: (z, y[1:]), ValueError, r"target must have shape \[batch\] = \(9,\)"),
        (lambda z, y: (z, y.double()), TypeError, "target must be torch.int32 or torch.int64"),
        (lambda z, y: (z, y + 1), IndexError, r"target must lie in \[0, 4\), got 4"),
        (lambda z, y: (z, y.to("meta")), ValueError, "target must be on the device cpu, got meta"),
    ],
)
def test_mistakes_get_one_sentence(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiClassHingeLoss()(*change(*random_logits(4)))


# Learners


def grads(rule: type[bpfree.Learner], loss: object, **options: Any) -> tuple[Any, list[Tensor]]:
    learner = rule(dense(), loss=loss, **options)  # type: ignore[arg-type]
    result = learner.grads(*dense_batch())
    return result, [p.grad for p in learner.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rule", RULES)
def test_the_name_is_the_module_with_its_defaults(rule: type[bpfree.Learner]) -> None:
    by_name, named = grads(rule, "hinge")
    by_module, given = grads(rule, MultiClassHingeLoss())
    assert torch.equal(by_name.loss, by_module.loss)
    assert all(torch.equal(p, q) for p, q in zip(named, given, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_the_options(rule: type[bpfree.Learner]) -> None:
    """The loss, the output and the output layer's gradient, which is the loss's in every rule."""
    options = {"presynaptic": "standard"} if rule is bpfree.PEPITA else {}
    x, y = dense_batch()
    result, got = grads(rule, MultiClassHingeLoss(margin=0.4, off_class=0.7), **options)
    model = dense()
    logits = model(x)
    wanted = hinge(logits, y, 0.4, 0.7).mean()
    torch.testing.assert_close(result.loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.output, logits.detach(), rtol=1e-12, atol=1e-12)
    for grad, exact in zip(
        got[-2:], torch.autograd.grad(wanted, list(model[-1].parameters())), strict=True
    ):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-14)
    assert (grads(rule, "hinge", **options)[1][-1] - got[-1]).count_nonzero() > 0


@pytest.mark.parametrize("output_error", ["first", "second"])
def test_pepita_projects_the_gradient(output_error: str) -> None:
    """Its error is the gradient of the sample's loss, as in two literal passes."""
    x, y = conv_batch(9)
    loss = MultiClassHingeLoss(margin=0.4, off_class=0.7)
    options = {"output_error": output_error, "loss": loss}
    learner = bpfree.PEPITA(conv(), feedback_scale=1.0, input_shape=x.shape[1:], **options)
    model = conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = PlainPEPITA(model, learner.feedback, optimizer, **options)
    got, wanted = learner.grads(x, y), plain.backward(x, y)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=0)
    for p, q in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("margin", [None, 0.4])
def test_the_time_local_variant_projects_it_too(margin: float | None) -> None:
    """A net of the output layer alone: ∂W = mean of e · (x + F e)ᵀ."""
    model = nn.Sequential(nn.Linear(12, 4)).double()
    x, y = dense_batch()[0].flatten(1), dense_batch()[1]
    z = model(x)
    (error,) = torch.autograd.grad(hinge(z, y, 1.0 if margin is None else margin).sum(), z)
    before = snapshot(model)["0.weight"]
    loss = "hinge" if margin is None else MultiClassHingeLoss(margin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    learner = bpfree.PEPITA(model, optimizer, loss=loss, time_local=True, feedback_scale=1.0)
    learner.step(x, y)
    pre = x + error @ learner.feedback["input"].t()
    wanted = before - 0.5 * error.t() @ pre / len(x)
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (MultiClassHingeLoss(reduction="sum"), r"the reduction 'mean', got .*reduction='sum'\)"),
        (nn.CrossEntropyLoss(), r"loss must be one of .*, hinge, got CrossEntropyLoss\(\)"),
        ("Hinge", "loss must be one of ce, bce, mse, hinge, got 'Hinge'"),
    ],
)
def test_losses_that_are_refused(loss: Any, message: str) -> None:
    model = dense()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        bpfree.BP(model, loss=loss)
    with pytest.raises(ValueError, match=message):
        bpfree.training.evaluate(model, loss, dense_batch())
    assert_equal(model, before)


def test_evaluate_and_explain() -> None:
    x, y = dense_batch()
    learner = bpfree.DRTP(dense(), loss=MultiClassHingeLoss(margin=0.4))
    wanted = hinge(learner.model(x), y, 0.4).mean().item()
    assert learner.evaluate((x, y)).loss == pytest.approx(wanted, rel=1e-12)
    assert "DRTP, loss hinge(margin=0.4, off_class=None), " in learner.explain()


def make(loss: str | MultiClassHingeLoss) -> bpfree.Learner:
    model = dense()
    return bpfree.Shallow(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)


def test_checkpoints(tmp_path: Path) -> None:
    learner = make(MultiClassHingeLoss(margin=0.4))
    learner.step(*dense_batch())
    checkpoint.save(tmp_path / "it.pt", learner, epoch=1)
    other = make(MultiClassHingeLoss(margin=0.4))
    assert checkpoint.restore(other, checkpoint.load(tmp_path / "it.pt")) == 1
    assert_equal(other.model, snapshot(learner.model))
    for loss in ("hinge", MultiClassHingeLoss(margin=0.4, off_class=1.0)):
        with pytest.raises(ValueError, match=r"loss 'hinge\(margin=0.4, off_class=None\)', but"):
            checkpoint.restore(make(loss), checkpoint.load(tmp_path / "it.pt"))
    make(MultiClassHingeLoss()).load_state_dict(make("hinge").state_dict())


# Training


def test_bp_learns_the_digits() -> None:
    """Above the control whose hidden layer is frozen, as every accuracy has to be."""
    digits = data.load("digits")
    accuracy = {}
    for rule in (bpfree.BP, bpfree.Shallow):
        model = build_model("fc1-32", digits.input_shape, 10, "hardtanh", bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learner = rule(model, optimizer, loss="hinge")
        history = learner.fit((digits.train_x, digits.train_y), 25, 50)
        assert history[-1].train_loss < 0.5 * history[0].train_loss
        accuracy[rule] = learner.evaluate((digits.test_x, digits.test_y)).accuracy
    assert accuracy[bpfree.BP] > 0.93
    assert accuracy[bpfree.BP] > accuracy[bpfree.Shallow] + 0.03
