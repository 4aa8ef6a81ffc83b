"""The examples, run as a reader runs them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_autoencoder_learns_in_its_hidden_layers(seed: int) -> None:
    """The loss falls in every epoch, and below that of the same net with frozen hidden layers."""
    pytest.importorskip("sklearn")
    learned, frozen = load("autoencoder").run(4, seed)
    assert len(learned) == len(frozen) == 5
    assert learned[0] == frozen[0]
    assert learned == sorted(learned, reverse=True)
    assert learned[-1] < 0.15 * learned[0]
    assert learned[-1] < 0.9 * frozen[-1]


def test_autoencoder_from_the_command_line() -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / "autoencoder.py"), "--epochs", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    *_, before, after, summary = printed.splitlines()
    start, end, control = (float(number) for number in (before.split()[1], *after.split()[1:]))
    assert end < control < start
    fell, alone, hidden = (float(number) for number in re.findall(r"0\.\d{4}", summary))
    assert (fell, alone, hidden) == pytest.approx(
        (start - end, start - control, control - end), abs=2e-4
    )
