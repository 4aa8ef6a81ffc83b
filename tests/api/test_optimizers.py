"""Torch optimizers inside the kernels: the same numbers, the same state, in every order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from nets import assert_close, assert_equal, conv, conv_batch, dense, dense_batch, snapshot
from torch import Tensor, nn

import bpfree

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

IN_KERNEL: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam decay": lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-6, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "decoupled adam": lambda p: torch.optim.Adam(
        p, lr=0.02, weight_decay=0.3, decoupled_weight_decay=True
    ),
    # In float64, because torch rounds Adam's step size to the dtype of lr.
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "tensor lr sgd": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.5),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


class _OwnStep(torch.optim.SGD):
    @torch.no_grad()
    def step(self, _: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


ON_GRAD: dict[str, tuple[Make, str]] = {
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01), "no RMSprop"),
    "dampening": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
        "no dampening",
    ),
    "maximize": (lambda p: torch.optim.SGD(p, lr=0.01, maximize=True), "no maximize"),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), "no amsgrad"),
    "tensor betas": (
        lambda p: torch.optim.Adam(
            p, lr=0.01, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
        ),
        "no tensor but lr",
    ),
    "subclass": (lambda p: _OwnStep(p, lr=0.01), "no _OwnStep"),
}

NETS: dict[str, tuple[Callable[..., nn.Sequential], tuple[Tensor, Tensor]]] = {
    "dense": (dense, dense_batch()),
    "conv": (conv, conv_batch()),
}


def torch_step(learner: bpfree.Learner, x: Tensor, y: Tensor) -> None:
    """The same step by gradients and torch's own optimizer."""
    assert learner.optimizer is not None
    learner.optimizer.zero_grad()
    learner.grads(x, y)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def make_learner(make: Make, net: str = "dense") -> bpfree.DRTP:
    model = NETS[net][0]()
    return bpfree.DRTP(model, make(model.parameters()))


def forbid_step(optimizer: torch.optim.Optimizer) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("optimizer.step() was called")

    optimizer.step = refuse  # type: ignore[method-assign]


def assert_same_state(got: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> None:
    """The state dicts have the same layout and, up to rounding, the same values."""
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for position, wanted_entry in theirs["state"].items():
        entry = ours["state"][position]
        filled = {k for k, v in wanted_entry.items() if v is not None}  # torch notes "no momentum"
        assert {k for k, v in entry.items() if v is not None} == filled
        for name in filled:
            torch.testing.assert_close(entry[name], wanted_entry[name], rtol=1e-12, atol=1e-14)
            assert entry[name].stride() == wanted_entry[name].stride()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", IN_KERNEL)
def test_steps_in_the_kernels_are_those_of_torch(name: str, net: str) -> None:
    ours, theirs = (make_learner(IN_KERNEL[name], net) for _ in range(2))
    forbid_step(ours.optimizer)
    for _ in range(5):
        ours.step(*NETS[net][1])
        torch_step(theirs, *NETS[net][1])
    assert_close(ours.model, theirs.model)
    assert_same_state(ours.optimizer, theirs.optimizer)


@pytest.mark.parametrize("name", IN_KERNEL)
def test_kernels_and_torch_take_turns_on_one_state(name: str) -> None:
    """Also with the state saved and loaded in between, both ways."""
    batch = dense_batch()
    ours, theirs = (make_learner(IN_KERNEL[name]) for _ in range(2))
    for kind in ("kernel", "torch", "kernel", "load", "kernel", "load", "torch", "kernel"):
        if kind == "load":
            optimizer = IN_KERNEL[name](ours.model.parameters())
            optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
            ours = bpfree.DRTP(ours.model, optimizer)
        elif kind == "kernel":
            ours.step(*batch)
        else:
            torch_step(ours, *batch)
        if kind != "load":
            torch_step(theirs, *batch)
    assert_close(ours.model, theirs.model)
    assert_same_state(ours.optimizer, theirs.optimizer)


def test_loading_into_the_same_optimizer() -> None:
    """load_state_dict replaces the groups and the state, which the learner must not have cached."""
    batch = dense_batch()
    learner = make_learner(IN_KERNEL["adam"])
    learner.step(*batch)
    saved, model = copy.deepcopy(learner.optimizer.state_dict()), copy.deepcopy(learner.model)
    learner.step(*batch)
    wanted = snapshot(learner.model)
    learner.optimizer.param_groups[0]["lr"] = 7.0
    learner.step(*batch)
    learner.optimizer.load_state_dict(saved)
    learner.model.load_state_dict(model.state_dict())
    learner.step(*batch)
    assert_equal(learner.model, wanted)


@pytest.mark.parametrize("name", ON_GRAD)
def test_other_optimizers_run_on_grad(name: str) -> None:
    make, reason = ON_GRAD[name]
    ours, theirs = make_learner(make), make_learner(make)
    for parameter in ours.model.parameters():
        parameter.grad = torch.full_like(parameter, 100)  # from elsewhere: not part of a step
    for _ in range(4):
        ours.step(*dense_batch())
        torch_step(theirs, *dense_batch())
    assert_close(ours.model, theirs.model)
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert reason in ours.explain()
    assert "fused" not in ours.explain()


def test_fused_steps_leave_grad_alone() -> None:
    learner = make_learner(IN_KERNEL["adam"])
    learner.model[2].weight.grad = torch.ones_like(learner.model[2].weight)
    learner.step(*dense_batch())
    assert (learner.model[2].weight.grad == 1).all()


@pytest.mark.parametrize("net", NETS)
def test_weight_decay_for_weights_only(net: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        return torch.optim.AdamW(
            [{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 0.03}], lr=0.01
        )

    learners = []
    for _ in range(2):
        model = NETS[net][0]()
        learners.append(bpfree.DRTP(model, make(model)))
    ours, theirs = learners
    forbid_step(ours.optimizer)
    for _ in range(3):
        ours.step(*NETS[net][1])
        torch_step(theirs, *NETS[net][1])
    assert_close(ours.model, theirs.model)
    assert_same_state(ours.optimizer, theirs.optimizer)
    assert "weight and bias do not learn alike" in ours.explain()


def test_groups_that_agree_are_fused() -> None:
    model = dense()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    learner = bpfree.DRTP(model, torch.optim.Adam(groups, lr=0.01))
    assert learner.explain().count("fused with Adam") == 3
    learner.optimizer.param_groups[1]["lr"] = 0.02  # the first bias
    assert learner.explain().count("fused with Adam") == 2


def test_groups_of_one_optimizer_take_their_own_paths() -> None:
    """One group in the kernels, one on .grad: each is updated once."""

    def make(model: nn.Sequential) -> torch.optim.Optimizer:
        lower, upper = model[2].parameters(), model[5:].parameters()
        return torch.optim.Adam([{"params": lower}, {"params": upper, "amsgrad": True}], lr=0.01)

    models = [dense(), dense()]
    ours, theirs = (bpfree.DRTP(model, make(model)) for model in models)
    for parameter in ours.model.parameters():
        parameter.grad = torch.ones_like(parameter)  # from elsewhere: not part of a step
    for _ in range(3):
        ours.step(*dense_batch())
        torch_step(theirs, *dense_batch())
    assert_close(ours.model, theirs.model)
    assert_same_state(ours.optimizer, theirs.optimizer)
    text = ours.explain()
    assert text.count("fused") == 1
    assert text.count("no amsgrad") == 2


def test_a_group_added_later_learns() -> None:
    model = dense()
    learner = bpfree.DRTP(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    before = snapshot(model)
    learner.step(*dense_batch())
    assert torch.equal(model[5].weight, before["5.weight"])
    learner.optimizer.add_param_group({"params": list(model[5].parameters())})
    learner.step(*dense_batch())
    assert not torch.equal(model[5].weight, before["5.weight"])
    assert torch.equal(model[7].weight, before["7.weight"])


@pytest.mark.parametrize("name", ["momentum", "adam", "tensor lr"])
def test_schedulers_of_rate_and_momentum(name: str) -> None:
    def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8)

    ours, theirs = (make_learner(IN_KERNEL[name]) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        for learner, step in ((ours, ours.step), (theirs, None)):
            scheduler = scheduler_of(learner.optimizer)
            for _ in range(6):
                if step is None:
                    torch_step(learner, *dense_batch())
                else:
                    step(*dense_batch())
                scheduler.step()
    assert_close(ours.model, theirs.model)


def test_a_scheduler_before_the_first_step_still_warns() -> None:
    learner = make_learner(IN_KERNEL["sgd"])
    scheduler = torch.optim.lr_scheduler.StepLR(learner.optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_step_hooks_are_called() -> None:
    learner, calls = make_learner(IN_KERNEL["adam"]), []
    handle = learner.optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    learner.step(*dense_batch())
    assert calls == ["hook"]
    assert "hooks" in learner.explain()
    handle.remove()
    learner.step(*dense_batch())
    assert calls == ["hook"]
    assert "fused" in learner.explain()


def test_explaining_makes_no_state() -> None:
    learner = make_learner(IN_KERNEL["adam"])
    learner.explain()
    assert not learner.optimizer.state


def test_explain_names_every_path() -> None:
    model = conv()
    model[0][0].requires_grad_(False)
    learning = [p for n, p in model.named_parameters() if not n.startswith("3.")]
    text = bpfree.DRTP(model, torch.optim.Adam(learning)).explain()
    first, second, third, fourth = text.splitlines()[1:]
    assert text.startswith("DRTP, loss bce, cpu: ")
    assert first.startswith("  0.0: Conv2d(3, 4")
    assert "frozen (bias: it requires no gradient, weight: it requires" in first
    assert second.endswith("fused with Adam")
    assert "frozen (bias: it is not in the optimizer" in third
    assert fourth.endswith("fused with Adam")
    assert bpfree.DRTP(conv()).explain().count("no optimizer") == 4


class TestRefused:
    def test_optimizer_that_needs_a_closure(self) -> None:
        model = dense()
        with pytest.raises(TypeError, match="LBFGS needs a closure"):
            bpfree.DRTP(model, torch.optim.LBFGS(model.parameters()))

    def test_parameters_of_another_model(self) -> None:
        with pytest.raises(ValueError, match=r"parameter of shape \(7, 12\) in group 0"):
            bpfree.DRTP(dense(), torch.optim.SGD(dense().parameters(), lr=0.1))

    def test_something_else(self) -> None:
        with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got float"):
            bpfree.DRTP(dense(), 0.1)

    def test_a_bad_value_set_later(self) -> None:
        learner = make_learner(IN_KERNEL["sgd"])
        before = snapshot(learner.model)
        learner.optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr of SGD must be finite and not negative"):
            learner.step(*dense_batch())
        assert_equal(learner.model, before)


def test_a_parameter_that_was_put_in_later() -> None:
    """The optimizer's groups may change at any time; a stranger among them is refused."""
    learner = make_learner(IN_KERNEL["sgd"])
    stranger = torch.nn.Parameter(torch.zeros(2))
    learner.optimizer.param_groups[0]["params"][0] = stranger
    with pytest.raises(ValueError, match="that is not the model's"):
        learner.step(*dense_batch())
