"""The loop around a learner: batches, epochs, evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bpfree import seeds
from bpfree.losses import Loss, batch_loss, check_loss
from bpfree.results import BatchInfo, EpochResult, EvalResult
from bpfree_kernels import checks

if TYPE_CHECKING:
    from bpfree.rules.base import Learner

Data = tuple[Tensor, Tensor] | Iterable[Sequence[Tensor]]
"""A pair of tensors (x [samples, ...], y [samples]: inputs and class labels), or an iterable of
batches that are such pairs, like a `torch.utils.data.DataLoader`."""

Scheduler = torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau
"""A learning rate scheduler."""


def fit(
    learner: Learner,
    data: Data,
    epochs: int = 1,
    batch_size: int = 64,
    *,
    validation: Data | None = None,
    scheduler: Scheduler | None = None,
    seed: int = 0,
    start_epoch: int = 0,
    on_batch: Callable[[BatchInfo], None] | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> list[EpochResult]:
    """Learn for some epochs, in training mode; the model's modes are as before afterwards.

    Losses and accuracies are summed on the device and read once per epoch.

    Args:
        learner: the learner.
        data: a pair of tensors, shuffled here, or an iterable of batches, taken as it comes. Each
            batch goes to the model's device.
        epochs: how many epochs to run now.
        batch_size: samples per batch, for tensors; the last batch of an epoch may be shorter.
        validation: evaluated after every epoch.
        scheduler: stepped after every epoch and its validation, whose loss
            `torch.optim.lr_scheduler.ReduceLROnPlateau` gets (or else the training loss).
        seed: seed of the shuffling. Each (seed, epoch) has its own order, so a resumed run sees the
            batches that an uninterrupted one would.
        start_epoch: how many epochs have already been run.
        on_batch: called after every batch.
        on_epoch: called after every epoch, after the scheduler: the place to save a checkpoint.

    Returns:
        One result per epoch.

    Raises:
        TypeError: batches that are not pairs of tensors.
        ValueError: no samples, a batch size or number of epochs out of range, tensors of unequal
            length, or an iterator, which can be read only once, for more than one epoch.
        RuntimeError: a learner without an optimizer.
    """
    _check_epochs(data, epochs, start_epoch)
    if learner.optimizer is None:
        raise RuntimeError("fit needs an optimizer, but the learner was made without one.")
    history = []
    with _mode(learner.model, training=True):
        for epoch in range(start_epoch, start_epoch + epochs):
            lr = float(learner.optimizer.param_groups[0]["lr"])
            batches = _Batches(learner.model, data, batch_size, (seed, epoch))
            learned, seconds = _run_epoch(learner, batches, epoch + 1, on_batch)
            checked = None if validation is None else learner.evaluate(validation)
            result = _epoch_result(epoch + 1, learned, checked, seconds, lr)
            _schedule(scheduler, learned.loss if checked is None else checked.loss)
            history.append(result)
            if on_epoch is not None:
                on_epoch(result)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, data: Data, batch_size: int = 1000) -> EvalResult:
    """Loss and accuracy of a model, in evaluation mode; its modes are as before afterwards.

    Args:
        model: gives logits, [batch, classes].
        loss: name of the loss, or a `bpfree.nn.MultiClassHingeLoss` that takes the mean.
        data: a pair of tensors, or an iterable of batches; batches go to the model's device.
        batch_size: samples per batch, for tensors.

    Raises:
        IndexError: a label out of range, on the CPU.
        TypeError, ValueError: as `fit`; ValueError also for an unknown loss.
    """
    check_loss(loss)
    totals = None
    with _mode(model, training=False):
        for x, y in _Batches(model, data, batch_size, None):
            logits = model(x)
            checks.labels(y, logits.shape[0], logits.shape[1], logits.device)
            if totals is None:
                totals = _Totals(logits.device)
            totals.add(batch_loss(logits, y, loss), logits, y)
    return _finished(totals)


def _check_epochs(data: Data, epochs: int, start_epoch: int) -> None:
    if epochs < 0 or start_epoch < 0:
        raise ValueError(
            f"epochs and start_epoch must not be negative, got {epochs} and {start_epoch}."
        )
    if epochs > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"data must be readable once per epoch, got a {type(data).__name__}, which is used up "
            f"after the first of {epochs} epochs."
        )


def _run_epoch(
    learner: Learner,
    batches: _Batches,
    epoch: int,
    on_batch: Callable[[BatchInfo], None] | None,
) -> tuple[EvalResult, float]:
    """One epoch, and how many seconds it took."""
    totals = None
    start = time.perf_counter()
    for number, (x, y) in enumerate(batches, 1):
        result = learner.step(x, y)
        if totals is None:
            totals = _Totals(result.output.device)
        totals.add(result.loss, result.output, y)
        if on_batch is not None:
            on_batch(BatchInfo(epoch, number, batches.count, x.shape[0], result.loss))
    finished = _finished(totals)  # waits for the device, so the time below is that of the work
    return finished, time.perf_counter() - start


def _epoch_result(
    epoch: int, learned: EvalResult, checked: EvalResult | None, seconds: float, lr: float
) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        train_loss=learned.loss,
        train_accuracy=learned.accuracy,
        validation_loss=None if checked is None else checked.loss,
        validation_accuracy=None if checked is None else checked.accuracy,
        seconds=seconds,
        samples_per_second=learned.samples / seconds,
        lr=lr,
    )


def _schedule(scheduler: Scheduler | None, loss: float) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


class _Totals:
    """Loss and number of right answers, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self._samples = 0

    def add(self, loss: Tensor, scores: Tensor, y: Tensor) -> None:
        """Count a batch by its mean loss and scores of the classes, [batch, classes]."""
        self._samples += y.shape[0]
        self._loss.add_(loss, alpha=y.shape[0])
        self._right.add_((scores.argmax(1) == y).sum())

    def result(self) -> EvalResult:
        """Read the sums, which waits for the device."""
        return EvalResult(
            self._loss.item() / self._samples, self._right.item() / self._samples, self._samples
        )


def _finished(totals: _Totals | None) -> EvalResult:
    if totals is None:
        raise ValueError("data must hold at least one sample, got none.")
    return totals.result()


class _Batches:
    """The batches of one epoch, on the model's device.

    Attributes:
        count: how many there are, ``None`` if the data does not say.
    """

    def __init__(
        self, model: nn.Module, data: Data, batch_size: int, shuffle: tuple[int, int] | None
    ) -> None:
        """Check the data.

        Args:
            model: whose device the batches go to.
            data: tensors, or an iterable of batches.
            batch_size: samples per batch, for tensors.
            shuffle: (seed, epoch) that fix the order of the samples of tensors; ``None`` keeps it.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self._device = next(model.parameters()).device
        self.count: int | None = None
        tensors = _as_tensors(data)
        if tensors is not None:
            self.count = -(-tensors[0].shape[0] // batch_size)
            self._batches: Iterator[Any] = _cut(*tensors, batch_size, shuffle)
        else:
            self._batches = iter(data)
            if isinstance(data, Sized):
                # A DataLoader of an IterableDataset is Sized by its type, but has no length.
                with contextlib.suppress(TypeError):
                    self.count = len(data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
            x, y = _as_pair(batch)
            yield x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)


def _cut(
    x: Tensor, y: Tensor, batch_size: int, shuffle: tuple[int, int] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a pair of tensors into batches, in their order or in a random one."""
    starts = range(0, x.shape[0], batch_size)
    if shuffle is None:
        for start in starts:
            yield x[start : start + batch_size], y[start : start + batch_size]
        return
    order = torch.randperm(x.shape[0], generator=seeds.generator("shuffle", *shuffle))
    order_x, order_y = order.to(x.device), order.to(y.device)
    for start in starts:
        stop = start + batch_size
        yield x.index_select(0, order_x[start:stop]), y.index_select(0, order_y[start:stop])


def _as_tensors(data: Any) -> tuple[Tensor, Tensor] | None:
    """The pair of tensors that `data` is, or ``None`` if it is an iterable of batches."""
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be a pair of tensors (x, y) or an iterable of such batches, "
            f"got {type(data).__name__}."
        )
    if not isinstance(data, list | tuple) or not any(isinstance(item, Tensor) for item in data):
        return None
    x, y = _as_pair(data)
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"x and y of data must be of equal length, got shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    return x, y


def _as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, list | tuple):
        raise TypeError(f"a batch must be a pair of tensors (x, y), got {type(batch).__name__}.")
    if len(batch) != 2 or not all(isinstance(item, Tensor) for item in batch):
        kinds = ", ".join(type(item).__name__ for item in batch)
        raise TypeError(f"a batch must be a pair of tensors (x, y), got ({kinds}).")
    return batch[0], batch[1]


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Switch a model to training or evaluation, and every module back to its mode at the end."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
