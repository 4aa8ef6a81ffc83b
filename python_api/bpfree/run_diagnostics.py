"""What ``bpfree train --diagnostics`` follows: angles, and how the weights spread."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bpfree.diagnostics import (
    feedback_angle,
    has_feedback_angle,
    has_update_angles,
    update_angles,
    weight_histogram,
)
from bpfree.plots import diagnostics_plot
from bpfree.rules.base import Learner
from bpfree.rules.bp import BP


class RunDiagnostics:
    """Diagnostics of one run.

    Attributes:
        angles: by name, in degrees before the first epoch and after each: the `feedback_angle` of rules that
            have one, and each layer's of `update_angles`, but for backpropagation itself.
    """

    def __init__(self, learner: Learner, batch: tuple[Tensor, Tensor]) -> None:
        """Begin with a learner whose weights are the initial ones, also of a run to resume.

        Args:
            learner: the learner.
            batch: x and y on which the updates are compared, always the same.
        """
        self._learner = learner
        self._batch = batch
        self._initial = weight_histogram(learner)
        self.angles: dict[str, list[float]] = {}
        self.record()

    def record(self) -> None:
        """Note how things are after an epoch."""
        learner, now = self._learner, {}
        if has_feedback_angle(learner):
            now["feedback_angle"] = feedback_angle(learner)
        if has_update_angles(learner) and not isinstance(learner, BP):
            training = learner.model.training
            learner.eval()  # no dropout, in either of the two
            try:
                angles = update_angles(learner, *self._batch)
            finally:
                learner.train(training)
            now |= {f"update_angle_{layer}": angle for layer, angle in angles.items()}
        for name, angle in now.items():
            self.angles.setdefault(name, []).append(angle)

    def columns(self) -> dict[str, list[float]]:
        """What belongs beside each epoch's numbers: a name, and a value for each epoch."""
        return {name: values[1:] for name, values in self.angles.items()}

    def draw(self, path: Path, title: str) -> None:
        """Draw the angles, and the weights of each hidden layer before and after.

        Args:
            path: the PNG to write.
            title: what was trained.
        """
        diagnostics_plot(path, self.angles, self._initial, weight_histogram(self._learner), title)
