"""Every shipped Triton kernel, compiled ahead of time for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bpfree_kernels.triton.classifier import FEW_CLASSES_BLOCKS
from bpfree_kernels.triton.dense import FORWARD_BLOCKS, STEP_BLOCKS, UPDATE_BLOCKS
from bpfree_kernels.triton.drtp import SIGNAL_BLOCKS
from bpfree_kernels.triton.pepita import DIFFERENCE_BLOCKS

WORK = {
    "sm_80": ["blocks:float32", "blocks:tf32"],
    "sm_90": [
        "blocks:float32", "blocks:tf32", "blocks:bfloat16", "odd:bfloat16", "branches:float32",
    ],
    "sm_100": ["blocks:float32", "blocks:bfloat16"],
    "gfx942": ["blocks:float32", "blocks:bfloat16"],
}  # fmt: skip
"""What each target compiles (see `compile_triton`): all that differs there, in the time of a test."""

SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB that one block may use on A100, H100, B200 and MI300."""

DOT_KERNELS = {
    "step_kernel", "forward_kernel", "update_kernel", "few_classes_kernel", "linear_kernel",
    "change_and_learn_kernel", "change_kernel", "difference_kernel",
    "local_forward_kernel", "local_feedback_kernel", "local_update_kernel",
    "conv_error_kernel", "conv_gradient_kernel",
}  # fmt: skip

Launch = dict[str, Any]


def _compile(target: str) -> list[Launch]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", target, *WORK[target]]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Launch]]:
    """Every launch of every target, compiled."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(WORK, pool.map(_compile, WORK), strict=True))


@pytest.fixture(params=WORK)
def gpu(request: pytest.FixtureRequest) -> str:
    """A target's name."""
    return str(request.param)


@pytest.fixture
def launches(gpu: str, compiled: dict[str, list[Launch]]) -> list[Launch]:
    """Every launch of one target."""
    return compiled[gpu]


def _blocks(launch: Launch) -> tuple[int, ...]:
    names = ("BLOCK_N", "BLOCK_H", "BLOCK_K", "BLOCK_P")
    return tuple(launch["options"][name] for name in names if name in launch["options"])


def test_nothing_spills(launches: list[Launch]) -> None:
    assert [launch for launch in launches if launch["spilled"]] == []


def test_shared_memory_fits(gpu: str, launches: list[Launch]) -> None:
    assert max(launch["shared"] for launch in launches) <= SHARED_MEMORY[gpu] * 1024


def test_offsets_of_rows_are_64_bit(launches: list[Launch]) -> None:
    assert [launch for launch in launches if launch["narrow"]] == []


def test_every_block_size_was_compiled(gpu: str, launches: list[Launch]) -> None:
    """The tables are read from the modules: an entry that no launch reaches is found here."""
    used = {(launch["kernel"], _blocks(launch)) for launch in launches}
    units = (True,) if gpu == "gfx942" else (True, False)
    wanted = {("signal_kernel", blocks) for blocks in SIGNAL_BLOCKS.values()}
    wanted.add(("difference_kernel", DIFFERENCE_BLOCKS[:3]))
    for on_matrix_units in units:
        for kernel in ("step_kernel", "change_and_learn_kernel"):
            wanted |= {(kernel, blocks[:3]) for blocks in STEP_BLOCKS[on_matrix_units]}
        wanted |= {
            ("few_classes_kernel", blocks[:3]) for blocks in FEW_CLASSES_BLOCKS[on_matrix_units]
        }
        for kernel in ("forward_kernel", "linear_kernel", "change_kernel"):
            wanted.add((kernel, FORWARD_BLOCKS[on_matrix_units][:3]))
    wanted |= {
        ("update_kernel", blocks[:3])
        for (_, narrow), blocks in UPDATE_BLOCKS.items()
        if not narrow or gpu != "sm_80"  # where the 16-bit kernels are not compiled
    }
    assert wanted <= used


@pytest.mark.parametrize("work", ["blocks:bfloat16", "blocks:tf32"])
def test_tensor_cores_are_used(work: str, compiled: dict[str, list[Launch]]) -> None:
    launches = [launch for launch in compiled["sm_90"] if launch["work"] == work]
    dots = [launch for launch in launches if launch["kernel"] in DOT_KERNELS]
    assert {launch["kernel"] for launch in dots} == DOT_KERNELS
    assert all(launch["matrix"] for launch in dots)


def test_float32_stays_exact_by_default(compiled: dict[str, list[Launch]]) -> None:
    """Without torch's leave no float32 product goes through TF32."""
    launches = [launch for launch in compiled["sm_90"] if launch["work"] == "blocks:float32"]
    assert launches
    assert not any(launch["matrix"] for launch in launches)
