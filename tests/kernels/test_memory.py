"""The CPU's buffers are used again at the next step, but never while somebody still reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bpfree_kernels as bk
from bpfree_kernels import backends

pytestmark = pytest.mark.skipif(not backends.status("cpp").usable, reason="needs the extension")

BATCH, UNITS = 64, 512  # outputs of 128 KiB, which come from the pool


def _layer(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 32, generator=generator) for n in (BATCH, UNITS))
    feedback = torch.randn(3, UNITS, generator=generator)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return x, weight, feedback, labels


def _run(seed: int) -> torch.Tensor:
    x, weight, feedback, labels = _layer(seed)
    return bk.drtp_linear_grad(x, weight, None, feedback, labels, backend="cpp")[0]


def _expected(seed: int) -> torch.Tensor:
    x, weight, _, _ = _layer(seed)
    return torch.tanh(x.double() @ weight.double().T).float()


def test_outputs_that_are_kept_stay_as_they_are() -> None:
    kept = {seed: _run(seed) for seed in range(8)}
    for seed in range(100, 104):
        _run(seed)  # outputs that are dropped at once
    for seed, output in kept.items():
        torch.testing.assert_close(output, _expected(seed), rtol=1e-5, atol=1e-5)


def test_a_view_keeps_its_buffer() -> None:
    last_row = _run(0)[-1]
    for seed in range(1, 5):
        _run(seed)
    torch.testing.assert_close(last_row, _expected(0)[-1], rtol=1e-5, atol=1e-5)


def test_a_freed_output_is_used_again() -> None:
    first = _run(0).data_ptr()
    assert first in {_run(seed).data_ptr() for seed in range(1, 4)}


def test_threads_do_not_share_buffers() -> None:
    def work(seed: int) -> bool:
        outputs = [_run(seed) for _ in range(10)]
        return all(torch.equal(outputs[0], output) for output in outputs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.parametrize("megabytes", ["0", "1"])
def test_the_limit_is_read_from_the_environment(megabytes: str) -> None:
    code = (
        "import torch, bpfree_kernels as bk\n"
        "y = [bk.drtp_linear_grad(torch.rand(600, 8), torch.rand(900, 8), None, torch.rand(3, 900),\n"
        "     torch.zeros(600, dtype=torch.int64))[0] for _ in range(3)]\n"
        "assert all(bool(t.isfinite().all()) for t in y)\n"
    )
    environment = {**os.environ, "BPFREE_CPU_CACHE_MB": megabytes}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
