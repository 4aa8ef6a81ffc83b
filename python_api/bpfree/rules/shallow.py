"""Shallow learning: only the output layer learns, the control of every accuracy claim."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from bpfree.optimizers import Updates
from bpfree.results import StepResult
from bpfree.rules._output import learn_output
from bpfree.rules.base import Learner
from bpfree.stages import Layer, Stage


class Shallow(Learner):
    """A read-out of random features: every hidden layer keeps its initial weights.

    A rule that trains hidden layers has to beat this; reaching an accuracy alone proves nothing,
    because random features reach a good part of it.
    """

    rule = "shallow"
    layers = get_args(Layer)
    uses_slope = False

    def _learn(self, x: Tensor, y: Tensor, updates: Updates) -> StepResult:
        x = self.network.enter(x)
        for stage in self.network.hidden:
            x = stage.leave(stage.forward(x))
        return learn_output(self, x, y, updates)

    def _explain_stage(self, stage: Stage) -> str:
        if stage is self.network.output:
            return super()._explain_stage(stage)
        return "frozen (Shallow trains the output layer only)"
