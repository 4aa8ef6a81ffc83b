"""PEPITA in Triton: the tile function of a difference, and every way to launch a layer.

The formulas themselves are tested for every backend alike in `test_pepita`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bpfree_kernels import SGD, backends
from bpfree_kernels.reference import pepita as reference
from bpfree_kernels.triton import launch, pepita
from bpfree_kernels.update import UpdateRule

from .test_triton_bodies import DEVICE, RULES, error, random, step_args

STATUS = backends.status("triton")
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("step", [1e-30, 1e-4, 0.49, 0.51, 30.0])
def test_differences_keep_their_digits(activation: str, step: float) -> None:
    """To 1e-6 of the exact difference, where subtracting would have lost all digits of a small one.

    Only 1 − tanh² is no more exact than tanh is: at |z| = 4 three digits are gone.
    """
    z = torch.linspace(-4, 4, 801, device=DEVICE)[None] / (0.5 if activation == "sigmoid" else 1)
    change = torch.full_like(z, step)
    got = pepita.pepita_difference(z, change, None, activation, 0.0)
    wide = reference.pepita_difference(z.double(), change.double(), None, activation, 0.0)
    flat = 1 - torch.tanh(z.double() / (2 if activation == "sigmoid" else 1)) ** 2
    assert (((got.double() - wide) / wide).abs() * flat).max() < 1e-6


def pepita_step(
    body: Callable[..., Tensor], batch: int, classes: int | None, rule: UpdateRule
) -> list[Tensor]:
    """Δh, weight and bias of one step with 37 inputs and 21 units, some of them dropped out."""
    z, pre = random(batch, 21), random(batch, 37, seed=1)
    weight, bias = random(21, 37, seed=2) / 4, random(21)
    feedback = None if classes is None else random(classes, 37, seed=3) / 10
    change = random(batch, classes or 37, seed=4) / 10
    mask = 1.25 * (random(batch, 21, seed=5) > -1)
    read = (z, pre, change, feedback, mask)
    args = step_args(rule, weight, bias)
    return [body(*read, weight, bias, "tanh", 0.0, *args), weight, bias]


@pytest.mark.parametrize("batch", [1, 33, 128, 129])
@pytest.mark.parametrize("classes", [None, 1, 17, 70])
def test_every_way_through_pepita(batch: int, classes: int | None) -> None:
    """One launch and two; Δz from the change, from (W F) e and, with many classes, from W (F e)."""
    got = pepita_step(pepita.pepita_linear_step, batch, classes, SGD(0.1, 0.9))
    wanted = pepita_step(reference.pepita_linear_step, batch, classes, SGD(0.1, 0.9))
    assert max(map(error, got, wanted)) < 1e-6


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ways_through_pepita_agree(rule: UpdateRule, monkeypatch: pytest.MonkeyPatch) -> None:
    step = pepita.pepita_linear_step
    ways = [pepita_step(step, 40, 5, rule)]
    monkeypatch.setattr(pepita, "class_block", lambda *_: None)
    ways.append(pepita_step(step, 40, 5, rule))
    monkeypatch.setattr(pepita, "step_blocks", lambda *_: None)
    ways.append(pepita_step(step, 40, 5, rule))
    assert max(max(map(error, ways[0], way)) for way in ways[1:]) < 1e-6


def test_classes_fit_where_they_pay() -> None:
    """Up to as many as a block has samples, and in one block of a product."""
    few, many = launch.Blocks(32, 16, 64, 8, 3), launch.Blocks(128, 16, 64, 8, 3)
    half = random(1, dtype=torch.float16)
    blocks = [pepita.class_block(half, n, few) for n in (0, 1, 17, 32, 33)]
    assert blocks == [16, 16, 32, 32, None]
    assert [pepita.class_block(half, n, many) for n in (33, 64, 65)] == [64, 64, None]
