"""GAIT-prop: which inverse a layer takes, what is refused, frozen layers, checkpoints, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invertible_nets import CLASSES, batch_for, conv, dense, off_orthogonal
from nets import assert_close, assert_equal, snapshot
from torch import Tensor, nn

import bpfree
import bpfree_kernels as kernels
from bpfree import checkpoint
from bpfree.data import load
from bpfree.models import build_model
from bpfree.nn import InvertibleConv2d, InvertibleLinear
from bpfree_kernels import backends

SERIES, INVERSE = "by a series in W Wᵀ − I", "by its inverse, refined at every step"


def make(model: nn.Sequential, lr: float = 0.01, **options: Any) -> bpfree.GAITProp:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return bpfree.GAITProp(model, optimizer, **options)


def ways(learner: bpfree.Learner) -> list[str]:
    """How the errors of each layer but the first go down."""
    lines = learner.explain().splitlines()[2:]
    assert all((SERIES in line) != (INVERSE in line) for line in lines)
    return [SERIES if SERIES in line else INVERSE for line in lines]


def gradients(learner: bpfree.Learner) -> list[Tensor]:
    learner.model.zero_grad()
    learner.grads(*batch_for(learner.model))
    return [p.grad.clone() for p in learner.model.parameters()]


@pytest.mark.parametrize("far", [["7"], ["5"], ["3"], ["3", "7"]], ids=str)
def test_a_layer_far_from_orthogonal_is_inverted_from_then_on(
    far: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning with the step that finds it, whose errors come down again from that layer."""
    model = dense()
    with torch.no_grad():
        for name in far:
            weight = model.get_submodule(name).weight
            weight.add_(0.4 * torch.randn_like(weight))
    learner = bpfree.GAITProp(model)
    assert ways(learner) == [SERIES] * 3
    got = gradients(learner)
    wanted = [INVERSE if name in far else SERIES for name in ("3", "5", "7")]
    assert ways(learner) == wanted

    counts = {"invert": 0, "solve_nearly_orthogonal": 0}
    for op in counts:
        body = getattr(kernels, op)

        def counted(*args: Any, _op: str = op, _body: Any = body, **options: Any) -> Any:
            counts[_op] += 1
            return _body(*args, **options)

        monkeypatch.setattr(kernels, op, counted)
    again = gradients(learner)
    for one, other in zip(got, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)
    assert counts == {"invert": len(far), "solve_nearly_orthogonal": 3 - len(far)}

    inverted = dense()
    inverted.load_state_dict(model.state_dict())
    alone = bpfree.GAITProp(inverted, form="literal")
    for one, other in zip(got, gradients(alone), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * one.abs().max().item())


def test_layers_below_one_that_overflows_keep_the_series() -> None:
    model = dense(torch.float32, depth=3)
    with torch.no_grad():
        model[-1].weight.mul_(1e6)  # so that the errors of the first way down are not finite
    learner = bpfree.GAITProp(model)
    assert all(grad.isfinite().all() for grad in gradients(learner))
    assert ways(learner) == [SERIES] * 3 + [INVERSE]


def test_the_residual_bounds_every_signal() -> None:
    """Of the rows of the identity it is an average, which one bad direction hardly moves."""
    torch.manual_seed(0)
    features = 64
    direction = nn.functional.normalize(torch.randn(features), dim=0)
    layer = InvertibleLinear(features)
    with torch.no_grad():  # one singular value of W Wᵀ − I is 0.42, the others 0
        layer.weight += (1.42**0.5 - 1) * torch.outer(direction, direction @ layer.weight)
    stem = nn.Linear(features, features)
    model = nn.Sequential(stem, nn.LeakyReLU(0.1), layer)
    learner = bpfree.GAITProp(model)
    learner.grads(torch.randn(2 * features, features), torch.arange(2 * features) % features)
    assert ways(learner) == [INVERSE]


@pytest.mark.parametrize("samples", [2, 7])
def test_fewer_samples_or_fewer_outputs_make_the_rows_of_the_series(samples: int) -> None:
    model = off_orthogonal(dense(), 0.01)
    exact = bpfree.GAITProp(model, form="literal")
    learner = bpfree.GAITProp(model)
    batch = batch_for(model, samples)
    grads = []
    for one in (learner, exact):
        model.zero_grad()
        one.grads(*batch)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert ways(learner) == [SERIES] * 3
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * one.abs().max().item())


def test_steps_look_at_the_device_once() -> None:
    """One read of all residuals; a layer that is inverted needs more."""
    model = dense()
    learner = make(model, orthogonal_penalty=1.0)
    reads = []
    tolist = Tensor.tolist
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
        learner.step(*batch_for(model))
    assert reads == [(3,)]


@pytest.mark.parametrize("form", ["difference", "literal"])
@pytest.mark.parametrize(("make_net", "name"), [(dense, "5"), (conv, "2")])
def test_a_singular_weight_is_named_and_nothing_changes(
    make_net: Any, name: str, form: str
) -> None:
    model = make_net()
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight[1] = weight[0]
    learner = make(model, form=form, orthogonal_penalty=0.1)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(
            torch.linalg.LinAlgError,
            match=rf"layer '{name}' has no inverse: weight .* its condition number is (inf|\d\.\de)",
        ):
            learner.step(*batch_for(model))
        assert_equal(model, before)
    assert learner.optimizer is not None
    assert not learner.optimizer.state
    with torch.no_grad():
        nn.init.orthogonal_(weight)
    learner.step(*batch_for(model))
    assert not torch.equal(weight, before[f"{name}.weight"])


def test_frozen_layers_stay_and_pass_errors_on() -> None:
    model, free = dense(), dense()
    model[5].requires_grad_(False)
    before = snapshot(model)
    whole = gradients(bpfree.GAITProp(free))
    model.zero_grad()
    bpfree.GAITProp(model).grads(*batch_for(model))
    for (name, p), wanted in zip(model.named_parameters(), whole, strict=True):
        if name.startswith("5."):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, wanted)
    make(model, orthogonal_penalty=0.5).step(*batch_for(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("5.")


def test_a_frozen_stem_needs_no_inverse_of_what_is_above_it() -> None:
    """Nothing below the lowest layer that learns is computed: its own inverse may be missing."""
    model = dense()
    for layer in (model[1], model[3]):
        layer.requires_grad_(False)
    nn.init.zeros_(model[5].weight)
    make(model).step(*batch_for(model))
    model[3].bias.requires_grad_(True)
    with pytest.raises(torch.linalg.LinAlgError, match="layer '5'"):
        make(model).step(*batch_for(model))


def test_a_bias_may_learn_alone_beside_the_regulariser() -> None:
    model = dense()
    learner = bpfree.GAITProp(
        model, torch.optim.SGD([model[3].bias, model[5].weight], lr=0.1), orthogonal_penalty=1.0
    )
    before = snapshot(model)
    learner.step(*batch_for(model))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"3.bias", "5.weight"}


def test_the_penalty_keeps_weights_orthogonal() -> None:
    found = []
    for penalty in (0.0, 1.0):
        model = dense()
        learner = make(model, orthogonal_penalty=penalty)
        for _ in range(40):
            learner.step(*batch_for(model))
        found.append(max(kernels.orthogonality(model[i].weight).norm() for i in (3, 5, 7)))
    assert found[1] < 0.2 * found[0]


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """With layers that are inverted, too: inverses are no state, they come again."""
    straight = make(off_orthogonal(dense(), 0.2), orthogonal_penalty=0.1)
    data = batch_for(straight.model, 9)
    straight.fit(data, epochs=2, batch_size=4)
    first = make(off_orthogonal(dense(), 0.2), orthogonal_penalty=0.1)
    first.fit(data, epochs=1, batch_size=4)
    checkpoint.save(tmp_path / "run.pt", first, epoch=1)
    second = make(dense(), lr=1.0, orthogonal_penalty=0.1)
    start = checkpoint.restore(second, checkpoint.load(tmp_path / "run.pt"))
    second.fit(data, epochs=1, batch_size=4, start_epoch=start)
    assert_close(second.model, straight.model, 1e-10)
    assert INVERSE in ways(second)
    assert first.buffers == {}


def test_runs_repeat_and_follow_the_models_dtype() -> None:
    states = []
    for _ in range(2):
        model = off_orthogonal(conv(), 0.1)
        learner = make(model)
        learner.step(*batch_for(model))
        model.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        learner._updates.optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"]
        learner._updates.optimizer.state.clear()
        learner.step(*batch_for(model))
        states.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_explains_itself() -> None:
    model = conv()
    learner = make(model)
    lines = learner.explain().splitlines()
    assert lines[0].startswith("GAITProp, loss ce")
    assert lines[1].endswith("fused with SGD")
    assert all(line.endswith(f"fused with SGD; errors go down {SERIES}") for line in lines[2:])
    regular = make(model, orthogonal_penalty=1.0).explain().splitlines()
    assert regular[1].endswith("fused with SGD")
    apart = "gradient, then SGD by orthogonal_update (the regulariser joins it)"
    assert all(apart in line for line in regular[2:])
    literal = bpfree.GAITProp(model, form="literal").explain()
    assert literal.count("targets go down by its inverse, refined at every step") == 3


# What is taken, and what is not


def test_num_classes_are_what_the_output_layer_hands_on() -> None:
    model = nn.Sequential(nn.Linear(12, 9), nn.LeakyReLU(0.1), InvertibleLinear(9))
    assert bpfree.GAITProp(model, loss="mse").network.classes == 9
    learner = bpfree.GAITProp(model, num_classes=CLASSES)
    assert learner.network.classes == CLASSES
    assert model(torch.zeros(2, 12)).shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"num_classes must lie in 1 to 9, .* got 10"):
        bpfree.GAITProp(model, num_classes=10)
    assert model[2].outputs == CLASSES
    square = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9))
    bpfree.GAITProp(square, num_classes=9)
    with pytest.raises(
        ValueError, match=r"num_classes must be 9, .* layer '1', got 4: .*Invertible"
    ):
        bpfree.GAITProp(square, num_classes=4)


def net(*between: nn.Module, last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 9), *between, last or InvertibleLinear(9, outputs=CLASSES))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net(last=nn.Linear(9, 4)), r"layer '1' is Linear\(in_features=9, out_features=4"),
        (net(nn.Tanh()), r"LeakyReLU or none, but behind layer '0' is Tanh\(\)"),
        (net(nn.LeakyReLU(), InvertibleLinear(9), nn.ReLU()), r"behind layer '2' is ReLU\(\)"),
        (net(nn.LeakyReLU(), nn.Dropout(0.1)), r"'0' is Dropout\(p=0.1.* which has no inverse"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), InvertibleLinear(8)),
            r"'0' is MaxPool2d.* which has no inverse",
        ),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.Conv2d(2, 8, 2), nn.Flatten(), InvertibleLinear(8)
            ),
            r"layer '1' is Conv2d\(2, 8",
        ),
    ],
)
def test_what_has_no_inverse_is_refused_by_name(model: nn.Sequential, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bpfree.GAITProp(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"orthogonal_penalty": -1.0},
            "orthogonal_penalty must be finite and not negative, got -1",
        ),
        ({"orthogonal_penalty": float("nan")}, "orthogonal_penalty must be finite"),
        ({"form": "exact"}, "form must be one of 'difference', 'literal', got 'exact'"),
        ({"normalised": False}, "normalised .* must be true unless form is 'literal'"),
        ({"eta": 0.0}, "eta must be positive and finite, got 0.0"),
        ({"rate": float("inf")}, "rate must be positive and finite, got inf"),
        ({"backend": "triton"}, "backend must be 'cpp' or 'reference' for GAITProp, got 'triton'"),
        ({"loss": "l1"}, "loss must be one of"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bpfree.GAITProp(net(), **options)


def test_half_precision_is_refused_before_anything_changes() -> None:
    model = net().bfloat16()
    learner = make(model)
    before = snapshot(model)
    x, y = torch.randn(3, 12, dtype=torch.bfloat16), torch.arange(3)
    with pytest.raises(TypeError, match=r"got torch\.bfloat16"):
        learner.step(x, y)
    assert_equal(model, before)
    with pytest.raises(TypeError, match="weight of layer '1' must be float32 or float64"):
        learner._prepare((12,))  # on a GPU, where x may have this dtype


@pytest.mark.parametrize("make_net", [dense, conv])
@pytest.mark.parametrize("rule", [bpfree.BP, bpfree.Shallow, bpfree.FRFB, bpfree.URFB])
def test_baselines_train_invertible_layers(rule: type[bpfree.Learner], make_net: Any) -> None:
    """Auxiliary outputs have no gradient, and decay as every weight does."""
    model, plain = make_net(), make_net()
    feedback = {s.name: s.layer.weight.detach() for s in bpfree.BP(model).network.stages[1:]}
    given = {"feedback": feedback} if issubclass(rule, bpfree.URFB) else {}
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    learner = rule(model, torch.optim.SGD(model.parameters(), **options), loss="ce", **given)
    twin = bpfree.BP(plain, torch.optim.SGD(plain.parameters(), **options))
    if rule is bpfree.Shallow:
        plain[:-1].requires_grad_(False)
    grads = []
    for one in (learner, twin):
        one.grads(*batch_for(model))
        grads.append([p.grad for p in one.model.parameters() if p.grad is not None])
        one.model.zero_grad()
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    before = snapshot(model)
    torch.testing.assert_close(learner.step(*batch_for(model)), twin.step(*batch_for(model)))
    assert_close(model, plain, 1e-10)
    last = model[-1].weight
    torch.testing.assert_close(last[CLASSES:], 0.99 * before[f"{len(model) - 1}.weight"][CLASSES:])


@pytest.mark.parametrize("rule", [bpfree.DRTP, bpfree.PEPITA, bpfree.EKDAA])
def test_other_rules_refuse_invertible_layers(rule: type[bpfree.Learner]) -> None:
    with pytest.raises(TypeError, match="but layer '3' is a InvertibleLinear"):
        rule(dense())


def test_a_backend_without_the_inverses_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FRFB's other ops have Triton bodies: it would fail in the middle of its first step."""
    usable = backends.Status(True, "for this test")
    monkeypatch.setattr(backends, "status", lambda _: usable)
    with pytest.raises(ValueError, match="cpp, cuda, reference for the InvertibleConv2d '2'"):
        bpfree.FRFB(conv(), backend="triton")


def test_feedback_alignment_goes_through_strided_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.1),
        InvertibleConv2d(2, 3, 2, "same", features=4), nn.LeakyReLU(0.1), nn.Flatten(),
        InvertibleLinear(16, outputs=3),
    ).double()  # fmt: skip
    feedback = {name: model.get_submodule(name).weight.detach() for name in ("2", "5")}
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.arange(5) % 3
    bpfree.FRFB(model, loss="ce", feedback=feedback).grads(x, y)
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bpfree.BP(model).grads(x, y)
    for one, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-12)


# Learning


@pytest.mark.parametrize("name", ["gait2-64", "gait-conv"])
def test_hidden_layers_learn_beyond_frozen_ones(name: str) -> None:
    """The digits, few epochs; every hidden layer moves, and stays nearly orthogonal by its penalty."""
    data = load("digits")
    train, test = (data.train_x, data.train_y), (data.test_x, data.test_y)
    accuracies = {}
    for frozen in (False, True):
        model = build_model(name, data.input_shape, data.classes, seed=1)
        before = snapshot(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        learner: bpfree.Learner
        if frozen:
            learner = bpfree.Shallow(model, optimizer, loss="ce")
        else:
            learner = bpfree.GAITProp(model, optimizer, orthogonal_penalty=0.1)
        learner.fit(train, epochs=3, batch_size=32)
        accuracies[frozen] = learner.evaluate(test).accuracy
        weights = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")][:-1]
        moved = [(p - before[n]).norm() / before[n].norm() for n, p in weights]
        assert all(m > 0.02 for m in moved) == (not frozen)
    # They reached 0.94 and 0.79, 0.90 and 0.74.
    assert accuracies[False] > 0.87
    assert accuracies[False] > accuracies[True] + 0.08
