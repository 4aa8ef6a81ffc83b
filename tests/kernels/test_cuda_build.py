"""The CUDA extension without a GPU: it is built, keeps all in registers, loads, and registers its ops."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # which brings a cuobjdump

from bpfree_kernels import backends

from .compile_triton import CUOBJDUMP

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
OPS = [name for name in backends.ops() if "cuda" in backends.bodies_of(name)]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
SHARED_MEMORY = 48 * 1024
"""Bytes that a block may use on every device without asking for more."""


def _nvcc() -> str | None:
    """As setup.py looks for it."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), toolkit])
    return shutil.which(os.environ.get("NVCC", "nvcc"), path=path)


pytestmark = pytest.mark.skipif(
    _nvcc() is None or torch.version.hip is not None,
    reason="the CUDA extension needs nvcc, and a torch that is not built for ROCm",
)

Usage = dict[str, int]


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, Usage]]:
    """What every kernel of the library uses, by architecture and mangled name."""
    command = [CUOBJDUMP, "--dump-resource-usage", backends.CUDA_EXTENSION]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, Usage]] = defaultdict(dict)
    for part in text.split("arch = ")[1:]:
        architecture = part.split()[0]
        for name, usage in re.findall(r"Function (\S+):\n(.*)", part):
            numbers = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
            found[architecture][name] = {kind: int(number) for kind, number in numbers}
    return found


def test_extension_of_this_checkout_is_there() -> None:
    """Where there is a compiler every other test is about what it made."""
    assert backends.CUDA_EXTENSION.exists(), backends.status("cuda").reason


def test_every_kernel_is_compiled_for_every_architecture(
    kernels: dict[str, dict[str, Usage]],
) -> None:
    assert set(kernels) == ARCHITECTURES
    sources = "".join(path.read_text() for path in SOURCES.glob("*.cuh"))
    written = set(re.findall(r"(\w+_kernel)\(", sources))
    for compiled in kernels.values():
        assert compiled.keys() == kernels["sm_80"].keys()
        assert {re.search(r"\d+([a-z_]+_kernel)I", name)[1] for name in compiled} == written


def test_nothing_spills(kernels: dict[str, dict[str, Usage]]) -> None:
    spills = [
        (architecture, name)
        for architecture, compiled in kernels.items()
        for name, usage in compiled.items()
        if usage["STACK"] + usage["LOCAL"] > 0
    ]
    assert spills == []


def test_shared_memory_fits(kernels: dict[str, dict[str, Usage]]) -> None:
    used = [usage["SHARED"] for compiled in kernels.values() for usage in compiled.values()]
    assert 0 < max(used) <= SHARED_MEMORY


def test_later_devices_are_served() -> None:
    """They compile the PTX of the last architecture."""
    command = [CUOBJDUMP, "--list-ptx", backends.CUDA_EXTENSION]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+", text)) == {"sm_100"}


def test_library_loads_and_registers_without_a_gpu() -> None:
    """In a process of its own, where no GPU can be seen: the CUDA key has a body from this library."""
    program = f"""
import json, torch
def registered():
    key = "CUDA"
    return [torch._C._dispatch_has_kernel_for_dispatch_key("bpfree::" + op, key) for op in {OPS!r}]
library = torch.library.Library("bpfree", "FRAGMENT")
before = [torch._C._dispatch_has_kernel("bpfree::" + op) for op in {OPS!r}]
torch.ops.load_library({str(backends.CUDA_EXTENSION)!r})
print(json.dumps([before, registered(), torch.cuda.is_initialized()]))
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    before, after, initialised = json.loads(done.stdout)
    assert not any(before)
    assert all(after)
    assert not initialised


def test_the_package_uses_it() -> None:
    """Loaded when the library is imported, and idle only for want of a device."""
    loaded = backends._load_cuda_extension()
    assert loaded.usable, loaded.reason
    assert (
        torch.cuda.is_available() or "torch sees no CUDA device" in backends.status("cuda").reason
    )
