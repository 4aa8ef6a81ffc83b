"""Peak extra memory of a training step on 2 and on 32 hidden layers: DRTP's does not grow with depth.

Weights, the optimizer's state and the data exist before.

    pytest benchmarks/bench_memory.py
"""

from __future__ import annotations

import pytest
from compare import NOTES
from peak_memory import MEASURABLE, peak_extra
from pytest_benchmark.fixture import BenchmarkFixture

WIDTH, BATCH, CLASSES = 1024, 1024, 10
DEPTHS = (2, 32)

_STEP = """
import torch, bpfree
from torch import nn
rule, depth, width, batch, classes = sys.argv[1], *map(int, sys.argv[2:])
layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
model = nn.Sequential(*layers, nn.Linear(width, classes))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
learner = {"drtp": bpfree.DRTP, "bp": bpfree.BP}[rule](model, optimizer)
x, y = torch.rand(batch, width), torch.randint(0, classes, (batch,))
run = lambda: learner.step(x, y)
"""


def peak_of_step(rule: str, depth: int) -> int:
    """Bytes above what was resident before a step, at the step's highest."""
    return peak_extra(_STEP, rule, depth, WIDTH, BATCH, CLASSES)


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_memory_by_depth(benchmark: BenchmarkFixture) -> None:
    peaks = {rule: [peak_of_step(rule, depth) for depth in DEPTHS] for rule in ("drtp", "bp")}
    for rule, (shallow, deep) in peaks.items():
        NOTES.append(
            f"Peak extra memory of a {rule} step, batch {BATCH}: {shallow / 2**20:.1f} MiB on "
            f"{DEPTHS[0]} hidden layers of {WIDTH}, {deep / 2**20:.1f} MiB on {DEPTHS[1]} "
            f"({deep / shallow:.2f} times)."
        )
        benchmark.extra_info[rule] = {"bytes": [shallow, deep], "ratio": deep / shallow}
    benchmark.pedantic(peak_of_step, args=("drtp", DEPTHS[0]), rounds=1, iterations=1)
