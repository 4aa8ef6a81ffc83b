"""Peak extra memory of a training step on 2 and on 32 hidden layers: DRTP's does not grow with depth.

Each measurement runs in a process of its own: resident memory at its highest during a step, less
what was resident before it (Linux only). Weights, gradients of the optimizer's state and data exist before.

    pytest benchmarks/bench_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare import NOTES
from pytest_benchmark.fixture import BenchmarkFixture

WIDTH, BATCH, CLASSES = 1024, 1024, 10
DEPTHS = (2, 32)

_MEASURE = """
import sys, json, torch, bpfree
from torch import nn
rule, depth, width, batch, classes = sys.argv[1], *map(int, sys.argv[2:])
def field(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
model = nn.Sequential(*layers, nn.Linear(width, classes))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
learner = {"drtp": bpfree.DRTP, "bp": bpfree.BP}[rule](model, optimizer)
x, y = torch.rand(batch, width), torch.randint(0, classes, (batch,))
for _ in range(2):  # the libraries' own buffers exist after the first step
    learner.step(x, y)
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = field("VmRSS")
learner.step(x, y)
print(json.dumps(field("VmHWM") - before))
"""


def peak_extra(rule: str, depth: int) -> int:
    """Bytes above what was resident before a step, at the step's highest."""
    arguments = [rule, *map(str, (depth, WIDTH, BATCH, CLASSES))]
    # freed blocks go back at once, so that what is resident is what is in use
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return int(json.loads(done.stdout))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_by_depth(benchmark: BenchmarkFixture) -> None:
    peaks = {rule: [peak_extra(rule, depth) for depth in DEPTHS] for rule in ("drtp", "bp")}
    for rule, (shallow, deep) in peaks.items():
        NOTES.append(
            f"Peak extra memory of a {rule} step, batch {BATCH}: {shallow / 2**20:.1f} MiB on "
            f"{DEPTHS[0]} hidden layers of {WIDTH}, {deep / 2**20:.1f} MiB on {DEPTHS[1]} "
            f"({deep / shallow:.2f} times)."
        )
        benchmark.extra_info[rule] = {"bytes": [shallow, deep], "ratio": deep / shallow}
    benchmark.pedantic(peak_extra, args=("drtp", DEPTHS[0]), rounds=1, iterations=1)
