"""What ``bpfree train --diagnostics`` follows: the feedback's angle, and how the weights spread."""

from __future__ import annotations

from pathlib import Path

from bpfree.diagnostics import feedback_angle, has_feedback_angle, weight_histogram
from bpfree.plots import diagnostics_plot
from bpfree.rules.base import Learner


class RunDiagnostics:
    """Diagnostics of one run.

    Attributes:
        angles: `feedback_angle` before the first epoch and after each; empty for rules without.
    """

    def __init__(self, learner: Learner) -> None:
        """Begin with a learner whose weights are the initial ones, also of a run to resume."""
        self._learner = learner
        self._initial = weight_histogram(learner)
        self.angles: list[float] = []
        self.record()

    def record(self) -> None:
        """Note how things are after an epoch."""
        if has_feedback_angle(self._learner):
            self.angles.append(feedback_angle(self._learner))

    def columns(self) -> dict[str, list[float]]:
        """What belongs beside each epoch's numbers: a name, and a value for each epoch."""
        return {"feedback_angle": self.angles[1:]} if self.angles else {}

    def draw(self, path: Path, title: str) -> None:
        """Draw the angles, and the weights of each hidden layer before and after.

        Args:
            path: the PNG to write.
            title: what was trained.
        """
        diagnostics_plot(path, self.angles, self._initial, weight_histogram(self._learner), title)
