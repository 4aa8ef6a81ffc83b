"""``make gpu``: every GPU test and the GPU benchmarks, in one run and one result file.

Needs a GPU and torch, triton and pytest as they are on the machine; no network. Stops the benchmarks in
time to be done within nine minutes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

LIMIT_SECONDS = 9 * 60
RESULTS = Path("docs/results")


def _run(title: str, *arguments: str, seconds: float) -> int:
    print(f"== {title}", flush=True)
    try:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, timeout=max(seconds, 1), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{title}: stopped after {seconds:.0f} s")
        return 124


def main() -> int:
    """Run the CUDA extension, doctor, tests and benchmarks; the exit status is 0 only if all passed."""
    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch can see; this machine has none.")
        return 1
    start = time.monotonic()

    def left() -> float:
        return LIMIT_SECONDS - (time.monotonic() - start)

    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    target = RESULTS / f"gpu-{name}"
    statuses = [
        # First, because its loading and launching can be shown nowhere else.
        _run(
            "CUDA extension", "pytest", "tests/kernels/test_gpu_inverse.py", "-q",
            "-p", "no:cacheprovider", seconds=60,
        ),
        _run("doctor", "bpfree_kernels", seconds=60),
        _run(
            "tests", "pytest", "tests/kernels", "tests/api", "-q", "-k", "cuda or gpu",
            "-p", "no:cacheprovider", seconds=min(left(), 240),
        ),
        _run(
            "benchmarks", "pytest", "benchmarks/bench_drtp.py", "benchmarks/bench_pepita.py",
            "benchmarks/bench_local_conv.py", "benchmarks/bench_ekdaa.py",
            "benchmarks/bench_invertible_conv.py",
            "-q", "-k", "cuda",
            "--results", str(target), seconds=left(),
        ),
    ]  # fmt: skip
    print(f"{time.monotonic() - start:.0f} s; statuses of the four parts, in order: {statuses}")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
