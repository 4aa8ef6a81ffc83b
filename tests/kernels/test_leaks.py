"""Calls of the ops leave nothing behind on the heap: a small leak pins large freed blocks, too."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from bpfree_kernels import backends
from bpfree_kernels.examples import EXAMPLES, example_args


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _bytes_in_use() -> int:
    """Bytes that malloc has given out and not got back (glibc 2.33 and later)."""
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("needs glibc's mallinfo2")
    mallinfo.restype = _MallInfo
    return int(mallinfo().uordblks)


@pytest.mark.skipif(not backends.status("cpp").usable, reason="needs the extension")
@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_stays_on_the_heap(name: str) -> None:
    body, args = backends.body(name, "cpu", "cpp"), example_args(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has a heap of its own, and only this one is counted
    gc.disable()  # what it frees meanwhile of others' would hide what the calls leave
    try:
        for _ in range(50):
            body(*args)
        before = _bytes_in_use()
        for _ in range(1000):
            body(*args)
        assert _bytes_in_use() - before < 1000 * 8
    finally:
        gc.enable()
        torch.set_num_threads(threads)
