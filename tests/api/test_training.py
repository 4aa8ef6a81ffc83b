"""The loop: batches, epochs, evaluation; and whether hidden layers really learn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from nets import assert_equal, dense, dense_batch, hinge, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bpfree
from bpfree.results import BatchInfo, EpochResult
from bpfree_kernels import checks


def make_learner(rule: type[bpfree.Learner] = bpfree.DRTP, dropout: float = 0.0) -> bpfree.Learner:
    model = dense(dropout)
    return rule(model, torch.optim.SGD(model.parameters(), lr=0.01))


class Recording(bpfree.Shallow):
    """Notes the first feature of every sample, in the order in which it learns them."""

    def __init__(self) -> None:
        model = dense()
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.01))
        self.batches: list[list[float]] = []
        self.modes: list[bool] = []

    def step(self, x: Tensor, y: Tensor) -> bpfree.StepResult:
        self.batches.append(x[:, 0, 0].tolist())
        self.modes.append(self.model.training)
        return super().step(x, y)

    @property
    def order(self) -> list[float]:
        return [value for batch in self.batches for value in batch]


class TestFit:
    def test_every_sample_once_in_a_random_order(self) -> None:
        x, y = dense_batch(10)
        learner = Recording()
        learner.fit((x, y), epochs=2, batch_size=4)
        assert [len(batch) for batch in learner.batches] == [4, 4, 2, 4, 4, 2]
        first, second = learner.order[:10], learner.order[10:]
        everything = x[:, 0, 0].tolist()
        assert sorted(first) == sorted(second) == sorted(everything)
        assert len({tuple(first), tuple(second), tuple(everything)}) == 3

    def test_the_order_belongs_to_seed_and_epoch(self) -> None:
        data = dense_batch(10)
        straight, resumed, other = Recording(), Recording(), Recording()
        straight.fit(data, epochs=3, batch_size=4, seed=5)
        torch.manual_seed(123)
        resumed.fit(data, epochs=2, batch_size=4, seed=5, start_epoch=1)
        other.fit(data, epochs=3, batch_size=4, seed=6)
        assert resumed.batches == straight.batches[3:]
        assert other.batches != straight.batches

    def test_labels_stay_with_their_inputs(self) -> None:
        x = torch.zeros(8, 3, 4, dtype=torch.float64)
        y = torch.arange(8) % 4
        x[:, 0, 0] = y
        learner = Recording()
        seen: list[bool] = []
        step = learner.step

        def check(x: Tensor, y: Tensor) -> bpfree.StepResult:
            seen.append(torch.equal(x[:, 0, 0].long(), y))
            return step(x, y)

        learner.step = check  # type: ignore[method-assign]
        learner.fit((x, y), batch_size=3)
        assert seen == [True] * 3

    def test_results(self) -> None:
        x, y = dense_batch(10)
        learner, twin = make_learner(), make_learner()
        history = learner.fit((x, y), epochs=2, batch_size=10, validation=(x[:4], y[:4]))
        assert [result.epoch for result in history] == [1, 2]
        result = twin.step(x, y)
        assert history[0].train_loss == pytest.approx(result.loss.item(), rel=1e-12)
        right = (result.output.argmax(1) == y).double().mean().item()
        assert history[0].train_accuracy == pytest.approx(right)
        checked = twin.evaluate((x[:4], y[:4]))
        assert history[0].validation_loss == pytest.approx(checked.loss, rel=1e-12)
        assert history[0].validation_accuracy == checked.accuracy
        assert history[0].seconds > 0
        assert history[0].samples_per_second == pytest.approx(10 / history[0].seconds)
        assert history[0].lr == 0.01

    def test_the_loss_weighs_samples_not_batches(self) -> None:
        x, y = dense_batch(7)
        learner = make_learner()
        learner.optimizer.param_groups[0]["lr"] = 0.0
        history = learner.fit((x, y), batch_size=3)
        assert history[0].train_loss == pytest.approx(learner.evaluate((x, y)).loss, rel=1e-12)

    def test_callbacks(self) -> None:
        batches: list[BatchInfo] = []
        epochs: list[EpochResult] = []
        learner = make_learner()
        history = learner.fit(
            dense_batch(5),
            epochs=2,
            batch_size=2,
            start_epoch=3,
            on_batch=batches.append,
            on_epoch=epochs.append,
        )
        assert epochs == history
        assert [(b.epoch, b.batch, b.samples) for b in batches] == [
            (4, 1, 2), (4, 2, 2), (4, 3, 1), (5, 1, 2), (5, 2, 2), (5, 3, 1),
        ]  # fmt: skip
        assert {b.batches for b in batches} == {3}
        assert batches[0].loss.shape == ()

    def test_data_loader(self) -> None:
        x, y = dense_batch(7)
        loader = DataLoader(TensorDataset(x, y), batch_size=3)
        learner, infos = Recording(), list[BatchInfo]()
        learner.fit(loader, epochs=2, on_batch=infos.append)
        assert learner.order == 2 * x[:, 0, 0].tolist()
        assert {info.batches for info in infos} == {3}

    def test_list_of_batches_and_generator(self) -> None:
        x, y = dense_batch(4)
        infos: list[BatchInfo] = []
        make_learner().fit([(x, y), (x[:1], y[:1])], epochs=2, on_batch=infos.append)

        def generate() -> Iterator[tuple[Tensor, Tensor]]:
            yield x, y

        make_learner().fit(generate(), on_batch=infos.append)
        assert [info.batches for info in infos] == [2, 2, 2, 2, None]
        with pytest.raises(ValueError, match="used up after the first of 2 epochs"):
            make_learner().fit(generate(), epochs=2)

    def test_trains_in_training_mode_and_restores_every_mode(self) -> None:
        learner = Recording()
        learner.eval()
        learner.model[4].train()
        learner.fit(dense_batch(4), validation=dense_batch(4))
        assert learner.modes == [True]
        assert [m.training for m in learner.model] == [i == 4 for i in range(8)]

    def test_scheduler_steps_after_every_epoch(self) -> None:
        learner = make_learner()
        scheduler = torch.optim.lr_scheduler.StepLR(learner.optimizer, 1, gamma=0.1)
        seen = []
        history = learner.fit(
            dense_batch(),
            epochs=3,
            scheduler=scheduler,
            on_epoch=lambda _: seen.append(learner.optimizer.param_groups[0]["lr"]),
        )
        assert [result.lr for result in history] == pytest.approx([1e-2, 1e-3, 1e-4])
        assert seen == pytest.approx([1e-3, 1e-4, 1e-5])

    def test_plateau_scheduler_gets_the_validation_loss(self) -> None:
        learner = make_learner()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(learner.optimizer)
        history = learner.fit(dense_batch(), scheduler=scheduler, validation=dense_batch(3))
        assert scheduler.best == history[0].validation_loss
        history = learner.fit(dense_batch(), scheduler=scheduler)
        assert scheduler.best in (history[0].train_loss, scheduler.best)

    def test_waits_for_the_device_once_an_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
            original = getattr(Tensor, name)
            monkeypatch.setattr(
                Tensor, name, lambda self, n=name, f=original: calls.append(n) or f(self)
            )
        monkeypatch.setattr(checks, "labels", lambda *_: None)  # waits for labels on the CPU only
        make_learner().fit(dense_batch(20), batch_size=2)
        assert calls == ["item", "item"]  # the sums of loss and right answers

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda le, x, y: le.fit((x, y[:-1])),
                ValueError,
                r"equal length.*\(6, 3, 4\).*\(5,\)",
            ),
            (lambda le, x, y: le.fit((x, y), batch_size=0), ValueError, "batch_size .* got 0"),
            (lambda le, x, y: le.fit((x, y), epochs=-1), ValueError, "epochs"),
            (lambda le, x, y: le.fit((x[:0], y[:0])), ValueError, "at least one sample"),
            (lambda le, _x, _y: le.fit([]), ValueError, "at least one sample"),
            (lambda le, x, _y: le.fit(x), TypeError, "pair of tensors .* got Tensor"),
            (lambda le, _x, _y: le.fit(3), TypeError, "got int"),
            (lambda le, x, y: le.fit((x, y, y)), TypeError, r"got \(Tensor, Tensor, Tensor\)"),
            (lambda le, x, y: le.fit([x, y.tolist()]), TypeError, r"got \(Tensor, list\)"),
            (lambda le, x, _y: le.fit([{"x": x}]), TypeError, "got dict"),
            (lambda le, _x, _y: le.evaluate(iter([])), ValueError, "at least one sample"),
            (lambda le, x, y: le.evaluate((x, y + 4)), IndexError, r"\[0, 4\)"),
        ],
    )
    def test_errors(self, call: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call(make_learner(), *dense_batch())  # type: ignore[operator]

    def test_needs_an_optimizer(self) -> None:
        with pytest.raises(RuntimeError, match="made without one"):
            bpfree.DRTP(dense()).fit(dense_batch())


class TestEvaluate:
    @pytest.mark.parametrize("loss", ["bce", "ce", "mse", "hinge"])
    def test_is_the_mean_over_samples(self, loss: str) -> None:
        x, y = dense_batch(11)
        learner = bpfree.DRTP(dense(dropout=0.5), loss=loss)
        whole, parts = learner.evaluate((x, y)), learner.evaluate((x, y.int()), batch_size=4)
        logits = learner.model.eval()(x)
        one_hot = nn.functional.one_hot(y, 4).double()
        wanted = {
            "bce": nn.functional.binary_cross_entropy_with_logits(logits, one_hot),
            "ce": nn.functional.cross_entropy(logits, y),
            "mse": nn.functional.mse_loss(logits, one_hot),
            "hinge": hinge(logits, y).mean(),
        }[loss].item()
        assert whole.loss == pytest.approx(wanted, rel=1e-12)
        assert parts.loss == pytest.approx(wanted, rel=1e-12)
        assert whole.accuracy == parts.accuracy == (logits.argmax(1) == y).sum().item() / 11
        assert whole.samples == parts.samples == 11

    def test_changes_nothing(self) -> None:
        learner = make_learner(dropout=0.5)
        before, random = snapshot(learner.model), torch.get_rng_state()
        first, second = (learner.evaluate(dense_batch()) for _ in range(2))
        assert first == second
        assert_equal(learner.model, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert learner.model.training

    def test_modes_survive_an_error(self) -> None:
        learner = make_learner()
        with pytest.raises(RuntimeError):
            learner.evaluate((torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2).long()))
        assert learner.model.training


# The canary. Random features reach a good part of any accuracy: alone, it proves nothing.


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10)
    )


def hidden_layers_learn(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether every hidden weight has moved by a good part of its own size."""
    moved = [
        (model.get_parameter(name) - weight).norm() / weight.norm()
        for name, weight in before.items()
        if name in ("0.weight", "2.weight")
    ]
    return bool(min(moved) > 0.5)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny layers: more threads only wait for each other, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(rule: type[bpfree.Learner]) -> tuple[float, bool]:
    training, test = digits()
    model = small_net()
    before = snapshot(model)
    learner = rule(model, torch.optim.Adam(model.parameters(), lr=5e-3), loss="bce")
    history = learner.fit(training, epochs=15, batch_size=50, validation=test)
    accuracy = history[-1].validation_accuracy
    assert accuracy is not None
    assert math.isfinite(history[-1].train_loss)
    return accuracy, hidden_layers_learn(before, model)


@pytest.mark.usefixtures("one_thread")
def test_drtp_beats_a_frozen_hidden_layer_on_digits() -> None:
    drtp, drtp_learns = train(bpfree.DRTP)
    shallow, shallow_learns = train(bpfree.Shallow)
    assert drtp_learns
    assert not shallow_learns
    assert drtp > 0.9
    assert drtp > shallow + 0.05


@pytest.mark.usefixtures("one_thread")
def test_a_dead_hidden_layer_is_noticed() -> None:
    class OneLayerDead(bpfree.DRTP):
        def _learn_hidden(self, stage, x, y, updates):  # type: ignore[no-untyped-def]
            if stage.name == "2":
                return stage.forward(x)
            return super()._learn_hidden(stage, x, y, updates)

    assert not train(OneLayerDead)[1]


class _Stream(torch.utils.data.IterableDataset[tuple[torch.Tensor, int]]):
    """A data set without a length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        x, y = dense_batch()
        return iter(list(zip(x, y.tolist(), strict=True)))


def test_a_loader_without_a_length() -> None:
    model = dense()
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loader = torch.utils.data.DataLoader(_Stream(), batch_size=2)
    counts = []
    learner.fit(loader, epochs=2, on_batch=lambda info: counts.append(info.batches))
    assert counts
    assert set(counts) == {None}
    assert learner.evaluate(loader).samples == len(dense_batch()[0])


def test_saturated_outputs_do_not_tie() -> None:
    """Accuracy is judged by the logits: their sigmoids may both round to 1."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    result = bpfree.Shallow(model, loss="bce").evaluate(
        (torch.tensor([[20.0, 30.0]]), torch.tensor([1]))
    )
    assert result.accuracy == 1
