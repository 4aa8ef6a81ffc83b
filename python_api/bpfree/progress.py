"""How a training run shows itself: a live bar on a terminal, one line for each epoch elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bpfree.metrics import error_percent
from bpfree.results import BatchInfo, EpochResult

_INTERVAL = 0.2  # seconds between two looks at the loss: each waits for the device


def make_reporter(epochs: int, start_epoch: int, batches: int) -> BarReporter | LineReporter:
    """The reporter for standard output as it is.

    Args:
        epochs: number of the last epoch.
        start_epoch: how many epochs are finished already.
        batches: batches in an epoch.
    """
    console = Console()
    if console.is_terminal:
        return BarReporter(console, epochs, start_epoch, batches)
    return LineReporter(epochs)


def epoch_line(result: EpochResult, epochs: int) -> str:
    """An epoch in one line of plain text."""
    return (
        f"epoch {result.epoch}/{epochs}  loss {result.train_loss:.4f}  "
        f"training error {error_percent(result.train_accuracy):.2f} %  "
        f"test error {error_percent(result.validation_accuracy):.2f} %  "
        f"{result.samples_per_second:,.0f} samples/s"
    )


class LineReporter:
    """Prints one line for each epoch: for files and pipes."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def on_batch(self, info: BatchInfo) -> None:
        """Says nothing."""

    def on_epoch(self, result: EpochResult) -> None:
        """Print the epoch's line at once, also into a pipe."""
        print(epoch_line(result, self._epochs), flush=True)


class BarReporter:
    """A bar over all epochs, with loss, test error, samples per second and the time left."""

    def __init__(self, console: Console, epochs: int, start_epoch: int, batches: int) -> None:
        self._epochs = epochs
        self._batches = batches
        self._shown = 0.0
        self._samples = 0
        self._since = 0.0
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  test error {task.fields[error]}"),
            TextColumn("{task.fields[speed]} samples/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            "", total=epochs * batches, completed=start_epoch * batches,
            epoch=start_epoch + 1, epochs=epochs, loss="–", error="–", speed="–",
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_batch(self, info: BatchInfo) -> None:
        """Move the bar on, a few times each second."""
        now = time.perf_counter()
        if info.batch == 1:
            self._samples, self._since = 0, now
        else:
            self._samples += info.samples
        if now - self._shown < _INTERVAL or info.batch == 1:
            return
        self._shown = now
        self._progress.update(
            self._task,
            completed=(info.epoch - 1) * self._batches + info.batch,
            epoch=info.epoch,
            loss=f"{info.loss.item():.4f}",
            speed=f"{self._samples / (now - self._since):,.0f}",
        )

    def on_epoch(self, result: EpochResult) -> None:
        """Show the test error of the epoch."""
        self._progress.update(
            self._task,
            completed=result.epoch * self._batches,
            epoch=result.epoch,
            loss=f"{result.train_loss:.4f}",
            error=f"{error_percent(result.validation_accuracy):.2f} %",
            speed=f"{result.samples_per_second:,.0f}",
        )
