"""The command line as a user calls it, on a net and batches that take no time."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner, Result

from bpfree import checkpoint
from bpfree.cli import app

TINY = ["--model", "fc1-16", "--batch-size", "100", "--device", "cpu"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def train(out: Path, *arguments: str) -> Result:
    return run("train", *TINY, "--out", str(out), *arguments)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(out / "checkpoint.pt")["learner"]["model"]
