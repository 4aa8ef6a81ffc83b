"""How an error goes down by the inverses of a net's square weights, and which way of it each layer takes.

A weight that is nearly orthogonal is not inverted: its error solves an equation by a series of products with
G = W Wᵀ − I (`bpfree_kernels.solve_nearly_orthogonal`). Of another weight the inverse is kept, and refined
at every step (`bpfree_kernels.invert`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.rules._layerwise import Passed
from bpfree.rules._products import windows_of
from bpfree.stages import Stage

WORST_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest residual of a series (see `bpfree_kernels.solve_nearly_orthogonal`) that an error is taken from."""


class Inverses:
    """Of one learner's layers."""

    def __init__(self, backend: str | None) -> None:
        """Take the backend of the ops."""
        self._backend = backend
        self._kept: dict[str, Tensor] = {}
        self._without_series: set[str] = set()
        self._orthogonality: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forget what belongs to the weights of the step before."""
        self._orthogonality.clear()

    def orthogonality(self, stage: Stage) -> Tensor:
        """G of a layer's weight, made once in a step."""
        if stage.name not in self._orthogonality:
            weight = stage.layer.weight
            self._orthogonality[stage.name] = kernels.orthogonality(weight, backend=self._backend)
        return self._orthogonality[stage.name]

    def exact(self, stage: Stage) -> Tensor:
        """W⁻ᵀ of a layer, shaped like W, refined from that of a step before.

        Raises:
            torch.linalg.LinAlgError: W is singular, or nearly so.
        """
        weight, start = stage.layer.weight, self._kept.get(stage.name)
        start = None if start is None else start.to(weight)
        try:
            inverse = kernels.invert(weight, start, backend=self._backend).value
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"layer {stage.name!r} has no inverse: {error}"
            ) from error
        self._kept[stage.name] = inverse
        return inverse

    def takes_series(self, stage: Stage) -> bool:
        """Whether the errors below a layer come from the series."""
        return stage.name not in self._without_series

    def leave_series(self, residuals: Mapping[Stage, Tensor]) -> Stage | None:
        """Look at residuals of series, and keep an inverse of the first layer where one is too large.

        Waits for the device.

        Args:
            residuals: by layer, from the highest down: below one that is too large they tell nothing.

        Returns:
            That layer.
        """
        if not residuals:
            return None
        off = torch.stack(list(residuals.values()))
        worst = WORST_RESIDUAL[off.dtype]
        for stage, value in zip(residuals, off.tolist(), strict=True):
            if not value <= worst:
                self._without_series.add(stage.name)
                return stage
        return None

    def carry_down(
        self, signal: Tensor, stage: Stage, x: Tensor, below: Passed
    ) -> tuple[Tensor, Tensor | None]:
        """δ_{l−1} = f′(z_{l−1}) ⊙ W_l⁻¹ δ_l, of the units below that hand on their output.

        Args:
            signal: δ_l of the outputs that are handed on; that of the auxiliary ones is 0.
            stage: the layer above.
            x: its input; only its size is read.
            below: the stage below.

        Returns:
            The error below, and the residual of the series if one was taken.

        Raises:
            torch.linalg.LinAlgError: a weight without an inverse.
        """
        layer = stage.layer
        if isinstance(layer, nn.Conv2d):
            rows, residual = self._rows(stage)
            error = kernels.invertible_conv_error(
                signal, rows, x.shape[2:], gate=below.z, **windows_of(layer),
                activation=below.stage.activation, slope=below.stage.slope, backend=self._backend,
            )  # fmt: skip
            return error, residual
        if self.takes_series(stage) and len(signal) < stage.outputs:
            # One row for each sample: fewer than for each output.
            padded = F.pad(signal, (0, layer.weight.shape[0] - stage.outputs))
            solution, residual = self._solve(padded, stage)
            arrived = solution @ layer.weight
        else:
            rows, residual = self._rows(stage)
            arrived = signal @ rows
        return below.stage.gate(below.back(arrived), below.z), residual

    def _rows(self, stage: Stage) -> tuple[Tensor, Tensor | None]:
        """W⁻ᵀ of the outputs that are handed on, [outputs, ...]; the residual if by the series."""
        weight, outputs = stage.layer.weight, stage.outputs
        if not self.takes_series(stage):
            return self.exact(stage)[:outputs], None
        unit = torch.eye(outputs, weight.shape[0], dtype=weight.dtype, device=weight.device)
        solution, residual = self._solve(unit, stage)
        residual = residual * outputs**0.5  # of any signal: at most all of it lies in one direction
        return (solution @ weight.flatten(1)).view(outputs, *weight.shape[1:]), residual

    def _solve(self, signal: Tensor, stage: Stage) -> kernels.Solution:
        g = self.orthogonality(stage)
        return kernels.solve_nearly_orthogonal(signal, g, backend=self._backend)
