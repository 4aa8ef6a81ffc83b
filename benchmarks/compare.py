"""Fair comparisons: all sides on the same data, interleaved, medians, and what they cost in accuracy.

Absolute times on a shared machine mean little; the ratio of two medians whose rounds alternate means
something. Every result carries the error of our side against float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Step = Callable[[], object]


@dataclass
class Comparison:
    """One scenario: medians in seconds of every side, ours first, and the errors beside them."""

    name: str
    medians: dict[str, float]
    spread: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next(iter(self.medians))

    def ratio(self, side: str) -> float:
        """Our median divided by a side's: below 1, ours is faster."""
        return self.medians[self.ours] / self.medians[side]


ALL: list[Comparison] = []
"""Every comparison of this run, in order; conftest.py prints and saves them."""


NOTES: list[str] = []
"""Measurements of this run that are no comparison of times, a sentence each; saved beside them."""


def _timed(step: Step, device: str, inner: int) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / inner
    start = time.perf_counter()
    for _ in range(inner):
        step()
    return (time.perf_counter() - start) / inner


def compare(
    name: str,
    sides: Mapping[str, Step],
    *,
    device: str = "cpu",
    rounds: int = 60,
    inner: int = 3,
    errors: Mapping[str, float] | None = None,
) -> Comparison:
    """Time all sides in turn, `rounds` times over, `inner` calls a time; ours is the first side."""
    for step in sides.values():  # compile, allocate, warm the caches
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, step in sides.items():
            times[side].append(_timed(step, device, inner))
    quartiles = {side: statistics.quantiles(values, n=4) for side, values in times.items()}
    result = Comparison(
        name,
        {side: statistics.median(values) for side, values in times.items()},
        {side: q[2] - q[0] for side, q in quartiles.items()},
        dict(errors or {}),
    )
    ALL.append(result)
    return result


def graphed(step: Step) -> Step:
    """The step captured in a CUDA graph, so that a launch-bound step shows what its kernels cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """‖value − exact‖ / ‖exact‖, in float64."""
    value, exact = value.double().cpu(), exact.double().cpu()
    return float((value - exact).norm() / exact.norm())
