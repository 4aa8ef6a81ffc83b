"""Saving and loading: bit for bit, whole or not at all, and nothing changes on an error."""

from __future__ import annotations

import copy
import signal
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_equal, conv, conv_batch, dense, dense_batch, snapshot

import bpfree
from bpfree import checkpoint


def make_learner(lr: float = 0.01, seed: int = 0, rule: type = bpfree.DRTP) -> bpfree.Learner:
    model = dense(dropout=0.3)
    learner: bpfree.Learner = rule(model, torch.optim.Adam(model.parameters(), lr=lr), seed=seed)
    return learner


def make_scheduler(learner: bpfree.Learner) -> torch.optim.lr_scheduler.LRScheduler:
    assert learner.optimizer is not None
    return torch.optim.lr_scheduler.MultiStepLR(learner.optimizer, [1, 3], gamma=0.5)


def assert_same(got: Any, wanted: Any) -> None:
    """Equal, tensors bit for bit."""
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    elif isinstance(wanted, Mapping):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_same(got[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    else:
        assert got == wanted


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Adam, dropout, a scheduler, a learner and a model that were made anew with other numbers."""
    data = dense_batch(23)
    torch.manual_seed(5)
    straight = make_learner()
    scheduler = make_scheduler(straight)
    history = straight.fit(data, epochs=2, batch_size=4, scheduler=scheduler, validation=data)

    torch.manual_seed(5)
    first = make_learner()
    scheduler = make_scheduler(first)
    part = first.fit(data, epochs=1, batch_size=4, scheduler=scheduler, validation=data)
    file = tmp_path / "run.pt"
    extra = {"note": "first", "numbers": [1, 2.5, None], "tensor": torch.arange(3)}
    checkpoint.save(file, first, epoch=1, history=part, scheduler=scheduler, extra=extra)

    torch.manual_seed(1234)
    second = make_learner(lr=0.5, seed=8)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.fill_(3)
    scheduler = make_scheduler(second)
    loaded = checkpoint.load(file)
    start = checkpoint.restore(second, loaded, scheduler=scheduler)
    rest = second.fit(
        data, epochs=1, batch_size=4, scheduler=scheduler, validation=data, start_epoch=start
    )

    assert start == 1
    assert_same(loaded["extra"], extra)
    assert_same(second.state_dict(), straight.state_dict())
    results = [*loaded["history"], *rest]
    timing = {"seconds": 0.0, "samples_per_second": 0.0}
    assert [r._replace(**timing) for r in results] == [r._replace(**timing) for r in history]


@pytest.mark.parametrize(
    "rule",
    [bpfree.DRTP, bpfree.PEPITA, bpfree.URFB, bpfree.FRFB, bpfree.Shallow, bpfree.BP],
)
def test_state_of_every_rule_round_trips(rule: type, tmp_path: Path) -> None:
    learner, other = make_learner(rule=rule), make_learner(rule=rule, seed=4)
    learner.step(*dense_batch())
    checkpoint.save(tmp_path / "a.pt", learner, epoch=0)
    checkpoint.restore(other, checkpoint.load(tmp_path / "a.pt"))
    assert_same(other.state_dict(), learner.state_dict())
    torch.manual_seed(0)
    learner.step(*dense_batch())
    assert_same(learner.state_dict()["model"].keys(), other.state_dict()["model"].keys())
    torch.manual_seed(0)
    other.step(*dense_batch())
    assert_same(other.state_dict(), learner.state_dict())


def test_state_before_the_first_batch_brings_its_seed() -> None:
    """Feedback of convolutions does not exist yet, and must come out as in the saved learner."""
    saved, other = bpfree.DRTP(conv(), seed=3), bpfree.DRTP(conv(), seed=4, input_shape=(3, 9, 8))
    other.load_state_dict(saved.state_dict())
    for learner in (saved, other):
        learner.grads(*conv_batch())
    assert_same(other.feedback, saved.feedback)


def test_a_loaded_learner_owns_its_feedback() -> None:
    saved, other = make_learner(), make_learner(seed=1)
    other.load_state_dict(saved.state_dict())
    other.feedback["2"].zero_()
    assert saved.feedback["2"].abs().max() > 0


def test_a_learner_without_optimizer_takes_the_rest() -> None:
    saved, reader = make_learner(), bpfree.DRTP(dense(), seed=1)
    saved.step(*dense_batch())
    reader.load_state_dict(saved.state_dict())
    assert_equal(reader.model, snapshot(saved.model))


def _other_model(state: dict[str, Any]) -> None:
    state["model"]["2.weight"] = torch.zeros(7, 13)


def _missing_parameter(state: dict[str, Any]) -> None:
    del state["model"]["7.bias"]


def _other_moment(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][4]["exp_avg"] = torch.zeros(3)


def _other_groups(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["params"].pop()


def _other_optimizer(state: dict[str, Any]) -> None:
    model = dense()
    state["optimizer"] = torch.optim.SGD(model.parameters(), lr=1.0).state_dict()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(rule="bp"), "rule 'bp', but the learner has 'drtp'"),
        (lambda s: s.update(loss="ce"), "loss 'ce', but the learner has 'bce'"),
        (lambda s: s.pop("feedback"), "lacks feedback"),
        (lambda s: s["feedback"].update({"2": torch.zeros(4, 8)}), r"'2' must have shape \(4, 7\)"),
        (lambda s: s["feedback"].update({"9": torch.zeros(4, 8)}), "has '9'"),
        (lambda s: s.update(optimizer=None), "no optimizer, but the learner has Adam"),
        (_other_model, r"'2.weight' of shape \(7, 13\), but the learner's is \(7, 12\)"),
        (_missing_parameter, "model of the state has"),
        (_other_moment, r"'exp_avg' of shape \(3,\) for a parameter of shape \(4, 5\)"),
        (_other_groups, r"groups of \[5\] parameters, but the learner's has \[6\]"),
        (_other_optimizer, "is no Adam: it lacks betas, eps"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Any, message: str) -> None:
    source, learner = make_learner(seed=1), make_learner()
    source.step(*dense_batch())
    learner.step(*dense_batch())
    learner.step(*dense_batch())
    before = copy.deepcopy(learner.state_dict())
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=message):
        learner.load_state_dict(state)
    assert_same(learner.state_dict(), before)


class TestFiles:
    def test_a_crash_while_saving_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, learner = tmp_path / "run.pt", make_learner()
        checkpoint.save(file, learner, epoch=1)
        old = file.read_bytes()

        def crash(_: Any, target: Any) -> None:
            target.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(file, learner, epoch=2)
        assert file.read_bytes() == old
        assert list(tmp_path.iterdir()) == [file]

    def test_saving_again_replaces(self, tmp_path: Path) -> None:
        file, learner = tmp_path / "run.pt", make_learner()
        for epoch in (1, 2):
            checkpoint.save(str(file), learner, epoch=epoch)
        assert checkpoint.load(str(file))["epoch"] == 2
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
    def test_of_another_kind(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "run.pt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint"):
            checkpoint.load(file)

    def test_cut_short(self, tmp_path: Path) -> None:
        file = tmp_path / "run.pt"
        checkpoint.save(file, make_learner(), epoch=1)
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            checkpoint.load(file)

    def test_of_another_program(self, tmp_path: Path) -> None:
        file = tmp_path / "run.pt"
        torch.save({"model": dense().state_dict()}, file)
        with pytest.raises(ValueError, match="not a checkpoint of this version"):
            checkpoint.load(file)

    def test_that_runs_code_is_not_loaded(self, tmp_path: Path) -> None:
        file = tmp_path / "run.pt"
        torch.save({"format": "bpfree checkpoint 1", "history": print}, file)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            checkpoint.load(file)

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            checkpoint.load(tmp_path / "run.pt")

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"a": [1, {"b": Path()}]}, r"extra\['a'\]\[1\]\['b'\] must be plain"),
            ({"a": Counter()}, "got Counter"),
            ({print: 1}, "key .* of extra"),
        ],
    )
    def test_that_could_not_be_loaded_is_not_written(
        self, tmp_path: Path, extra: dict[Any, Any], message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            checkpoint.save(tmp_path / "run.pt", make_learner(), epoch=1, extra=extra)
        assert not list(tmp_path.iterdir())


def test_scheduler_too_many_or_too_few(tmp_path: Path) -> None:
    learner = make_learner()
    scheduler = make_scheduler(learner)
    checkpoint.save(tmp_path / "with.pt", learner, epoch=1, scheduler=scheduler)
    checkpoint.save(tmp_path / "without.pt", learner, epoch=1)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match="holds a scheduler, but scheduler is None"):
        checkpoint.restore(learner, checkpoint.load(tmp_path / "with.pt"))
    with pytest.raises(ValueError, match="holds no scheduler"):
        checkpoint.restore(learner, checkpoint.load(tmp_path / "without.pt"), scheduler=scheduler)
    assert_same(learner.state_dict(), before)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    learner = make_learner()
    checkpoint.save(tmp_path / "a.pt", learner, epoch=0)
    wanted = torch.rand(5)
    torch.manual_seed(99)
    checkpoint.restore(learner, checkpoint.load(tmp_path / "a.pt"))
    assert torch.equal(torch.rand(5), wanted)


def test_two_learners_share_nothing() -> None:
    """A state that was handed over from a living learner is a copy, the optimizer's part too."""
    one, other = make_learner(), make_learner(seed=1)
    one.step(*dense_batch())
    other.load_state_dict(one.state_dict())
    before = copy.deepcopy(one.state_dict())
    other.step(*dense_batch())
    assert_same(one.state_dict(), before)


def test_a_scheduler_that_could_not_be_read_back(tmp_path: Path) -> None:
    """Found when it is saved, not when it is needed."""
    learner = make_learner()
    scheduler = make_scheduler(learner)
    scheduler.note = Path("anything")  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="scheduler holds an object"):
        checkpoint.save(tmp_path / "file", learner, epoch=0, scheduler=scheduler)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_saving_waits_until_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def interrupted(content: object, file: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    learner = bpfree.BP(dense())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "c.pt", learner, epoch=3)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.load(tmp_path / "c.pt")["epoch"] == 3


def test_saving_works_outside_the_main_thread(tmp_path: Path) -> None:
    learner = bpfree.BP(dense())
    thread = threading.Thread(
        target=checkpoint.save, args=(tmp_path / "c.pt", learner), kwargs={"epoch": 3}
    )
    thread.start()
    thread.join()
    assert checkpoint.load(tmp_path / "c.pt")["epoch"] == 3
