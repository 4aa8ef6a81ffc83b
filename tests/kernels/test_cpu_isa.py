"""The C++ kernels of the narrower instruction sets, which this processor would not choose by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bpfree_kernels import backends

HERE = Path(__file__).parent
FILES = (
    "test_drtp.py",
    "test_classifier.py",
    "test_hinge.py",
    "test_activations.py",
    "test_update.py",
    "test_update_norm.py",
    "test_layer.py",
    "test_dense.py",
    "test_pepita.py",
    "test_pepita_entries.py",
    "test_pepita_maps.py",
    "test_pepita_pool.py",
    "test_local_conv.py",
    "test_local_conv_feedback.py",
    "test_conv.py",
    "test_ekdaa.py",
    "test_ekdaa_winners.py",
    "test_ekdaa_learning.py",
    "test_inverse.py",
    "test_orthogonal_update.py",
    "test_invertible_conv.py",
)

SCRIPT = """
import sys
import pytest
from bpfree_kernels import _host
chosen = _host.processor()["chosen"]
if chosen != sys.argv[1]:
    sys.exit(f"the kernels run on {chosen}")
sys.exit(pytest.main(["-q", "-k", "cpp", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_set(isa: str) -> None:
    """All golden checks again, with the kernels compiled for another instruction set."""
    if not backends.status("cpp").usable:
        pytest.skip(backends.status("cpp").reason)
    from bpfree_kernels import _host

    sets = ["baseline", "avx2", "avx512"]
    if sets.index(isa) >= sets.index(_host.processor()["widest"]):
        pytest.skip(f"this processor's widest instruction set is {_host.processor()['widest']}")
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, isa, *(str(HERE / name) for name in FILES)],
        cwd=HERE.parents[1],
        env={**os.environ, "BPFREE_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
