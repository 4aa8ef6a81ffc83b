"""What steps keep: DRTP no activation, whatever the depth; EKDAA less than backprop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bpfree
from bpfree.models import build_model

BATCH, WIDTH = 64, 16


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that ops have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given:  # a view is nothing new
                    continue
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def peak_of_a_step(rule: type[bpfree.Learner], depth: int) -> int:
    torch.manual_seed(0)
    hidden = [
        m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1))
    ]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 4))
    learner = rule(model, torch.optim.SGD(model.parameters(), lr=0.01))
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % 4
    learner.step(x, y)
    with PeakMemory() as memory:
        learner.step(x, y)
    return memory.peak


def test_activation_memory_does_not_grow_with_depth() -> None:
    shallow, deep = (peak_of_a_step(bpfree.DRTP, depth) for depth in (2, 32))
    activation = BATCH * WIDTH * 4
    assert activation <= shallow  # or nothing was counted
    assert deep <= shallow + 256


def test_that_of_backprop_does() -> None:
    """The measurement can fail."""
    shallow, deep = (peak_of_a_step(bpfree.BP, depth) for depth in (2, 32))
    assert deep > shallow + 30 * BATCH * WIDTH * 4


@pytest.mark.parametrize("depth", [2, 8])
def test_convolutions_keep_nothing_either(depth: int) -> None:
    torch.manual_seed(0)
    hidden = [m for _ in range(depth) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(4 * 8 * 8, 3))
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.01))
    x, y = torch.randn(16, 4, 8, 8), torch.arange(16) % 3
    learner.step(x, y)
    with PeakMemory() as memory:
        learner.step(x, y)
    assert memory.peak <= 4.5 * x.nbytes  # input, pre-activation, output, signal


def test_error_kernels_need_less_than_backprop() -> None:
    """The paper's net; what an op needs for itself is not counted."""
    peaks = {}
    x, y = torch.randn(10, 1, 12, 12), torch.arange(10) % 3
    for rule in (bpfree.EKDAA, bpfree.BP):
        model = build_model("ekdaa", (1, 12, 12), 3)
        learner = rule(model, torch.optim.SGD(model.parameters(), lr=1e-4), loss="ce")
        learner.step(x, y)
        with PeakMemory() as memory:
            learner.step(x, y)
        peaks[rule] = memory.peak
    first_layer = 10 * 32 * 12 * 12 * 4
    assert peaks[bpfree.EKDAA] > 2 * first_layer  # z and f(z), or nothing was counted
    assert peaks[bpfree.EKDAA] < peaks[bpfree.BP]
