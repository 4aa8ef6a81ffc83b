"""The data sets themselves, where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bpfree import data
from bpfree.data import DataError

REAL = os.environ.get("BPFREE_DATA", "")

pytestmark = pytest.mark.skipif(
    not REAL, reason="BPFREE_DATA names no folder with the real data sets"
)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files(name: str) -> None:
    dataset = data.load(name, REAL)
    counts = {"mnist": [5923, 6742, 5958], "fashion-mnist": [6000] * 3}[name]
    mean = {"mnist": 33.318, "fashion-mnist": 72.940}[name]
    assert dataset.train_y.bincount()[:3].tolist() == counts
    assert len(dataset.test_y) == 10_000
    assert float(dataset.train_x.mean()) * 255 == pytest.approx(mean, abs=1e-2)
    other = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}[name]
    with pytest.raises(DataError, match=f"belongs to {name}, not to {other}"):
        data.load(other, Path(REAL) / name)


def test_real_cifar(tmp_path: Path) -> None:
    dataset = data.load("cifar-10", REAL)
    assert dataset.train_y.bincount().tolist() == [5000] * 10
    assert dataset.test_y[:5].tolist() == [3, 8, 8, 0, 6]
    means = dataset.train_x.mean((0, 2, 3)) * 255
    torch.testing.assert_close(means, torch.tensor([125.307, 122.950, 113.865]), atol=1e-2, rtol=0)
