"""Pictures of a training run. Needs matplotlib, of the extra ``[train]``; no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bpfree._extras import train_extra
from bpfree.metrics import error_percent
from bpfree.results import EpochResult


def learning_curve(path: Path, history: Sequence[EpochResult], title: str) -> None:
    """Draw loss and error over the epochs, training beside test.

    Args:
        path: the PNG to write.
        history: at least one epoch.
        title: what was trained.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with train_extra("A learning curve"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    epochs = [result.epoch for result in history]
    marker = "o" if len(epochs) == 1 else ""  # a single point has no line
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no global state, no window
    loss_axes, error_axes = figure.subplots(1, 2)
    loss_axes.plot(epochs, [r.train_loss for r in history], marker=marker, label="training")
    test_losses = [
        float("nan") if r.validation_loss is None else r.validation_loss for r in history
    ]
    loss_axes.plot(epochs, test_losses, marker=marker, label="test")
    loss_axes.set_ylabel("loss")
    train_errors = [error_percent(r.train_accuracy) for r in history]
    error_axes.plot(epochs, train_errors, marker=marker, label="training")
    test_errors = [error_percent(r.validation_accuracy) for r in history]
    error_axes.plot(epochs, test_errors, marker=marker, label="test")
    error_axes.set_ylabel("error (%)")
    error_axes.set_ylim(bottom=0)
    for axes in (loss_axes, error_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
