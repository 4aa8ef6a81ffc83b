"""What a training run leaves behind in numbers: ``metrics.json`` and ``metrics.csv``."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpfree.results import EpochResult
from bpfree_kernels.doctor import versions

LAST_EPOCHS = 10
"""The DRTP paper reports the test error as a mean over this many epochs at the end of a run."""


@dataclass(frozen=True)
class Summary:
    """What a run comes to.

    Attributes:
        epochs: number of epochs trained.
        test_error: test error after the last epoch, in percent.
        mean_test_error: mean test error of the last `averaged` epochs, in percent.
        averaged: `LAST_EPOCHS`, or fewer in a shorter run.
        seconds: time of learning, validation not counted.
    """

    epochs: int
    test_error: float
    mean_test_error: float
    averaged: int
    seconds: float


def error_percent(accuracy: float | None) -> float:
    """An accuracy from 0 to 1 as an error in percent; NaN if it was not measured."""
    return math.nan if accuracy is None else 100 * (1 - accuracy)


def summarize(history: Sequence[EpochResult]) -> Summary:
    """Sum up a run of at least one epoch."""
    errors = [error_percent(result.validation_accuracy) for result in history]
    last = errors[-LAST_EPOCHS:]
    return Summary(
        epochs=history[-1].epoch,
        test_error=errors[-1],
        mean_test_error=sum(last) / len(last),
        averaged=len(last),
        seconds=sum(result.seconds for result in history),
    )


def write_metrics(
    folder: Path,
    config: Mapping[str, object],
    history: Sequence[EpochResult],
    columns: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write ``metrics.json`` (everything) and ``metrics.csv`` (one row for each epoch).

    Args:
        folder: an existing folder; files of these names are replaced.
        config: what the run was asked to do, JSON values.
        history: the epochs so far.
        columns: further numbers for each of these epochs, by name.
    """
    document: dict[str, object] = {"config": dict(config), "versions": versions()}
    if history:
        summary = summarize(history)
        document["epochs"] = summary.epochs
        document["final_test_error_percent"] = _finite(summary.test_error)
        document[f"mean_test_error_percent_last_{LAST_EPOCHS}"] = _finite(summary.mean_test_error)
        document["epochs_averaged"] = summary.averaged
        document["training_seconds"] = round(summary.seconds, 3)
    columns = {} if columns is None else columns
    rows = [_row(result) for result in history]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = _finite(value)
    document["history"] = rows
    _replace(folder / "metrics.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*map(_column, EpochResult._fields), *columns])
        writer.writeheader()
        writer.writerows(rows)


def _row(result: EpochResult) -> dict[str, float | None]:
    return {_column(name): _finite(value) for name, value in result._asdict().items()}


def _column(field: str) -> str:
    """The command line validates on the test images, so its files call them that."""
    return field.replace("validation", "test")


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity; a diverged run has null there."""
    return value if value is not None and math.isfinite(value) else None


def _replace(path: Path, text: str) -> None:
    """Whoever watches the file while the run goes on never reads half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
