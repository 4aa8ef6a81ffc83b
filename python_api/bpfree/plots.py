"""Pictures of a training run. Needs matplotlib, of the extra ``[train]``; no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree._extras import train_extra
from bpfree.diagnostics import Histogram, density
from bpfree.metrics import error_percent
from bpfree.results import EpochResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_curve(path: Path, history: Sequence[EpochResult], title: str) -> None:
    """Draw loss and error over the epochs, training beside test.

    Args:
        path: the PNG to write.
        history: at least one epoch.
        title: what was trained.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, (loss_axes, error_axes) = make_figure(2)
    epochs = [result.epoch for result in history]
    marker = "o" if len(epochs) == 1 else ""  # a single point has no line
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
        _count_epochs(axes)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def diagnostics_plot(
    path: Path,
    angles: Mapping[str, Sequence[float]],
    before: Mapping[str, Histogram],
    after: Mapping[str, Histogram],
    title: str,
) -> None:
    """Draw angles over the epochs, and the weights before and after training.

    These are figures 3b and 5 of the PEPITA paper, and figures 3 and 4 of the GAIT-prop paper.

    Args:
        path: the PNG to write.
        angles: by name, in degrees, before the first epoch and after each; none leaves their picture out.
        before: initial weights of each hidden layer, by its name.
        after: the same now.
        title: what was trained.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, all_axes = make_figure(bool(angles) + len(after) or 1)
    if angles:
        axes, *all_axes = all_axes
        angle_curves(axes, angles)
    for axes, name in zip(all_axes, after, strict=False):
        for histogram, label in ((before[name], "before"), (after[name], "after")):
            axes.stairs(density(histogram).tolist(), histogram.edges.tolist(), label=label)
        axes.set_xlabel(f"weights of layer {name}")
        axes.set_ylabel("density")
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def angle_curves(axes: Axes, angles: Mapping[str, Sequence[float]]) -> None:
    """Draw angles in degrees, before the first epoch and after each, by name."""
    for name, values in angles.items():
        marker = "o" if len(values) < 3 else ""
        axes.plot(range(len(values)), values, marker=marker, label=name.replace("_", " "))
    axes.axhline(90, color="grey", linewidth=0.8)
    axes.set_ylabel("angle (degrees)")
    axes.legend()
    _count_epochs(axes)


def make_figure(pictures: int) -> tuple[Figure, list[Axes]]:
    """A figure with some pictures side by side.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with train_extra("A picture of the training"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * pictures, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no global state, no window
    return figure, list(figure.subplots(1, pictures, squeeze=False)[0])


def _count_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
