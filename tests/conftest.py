"""Set-up that every test shares: Triton's interpreter where there is no GPU, backends as a fixture."""

from __future__ import annotations

import os

import torch

# Read by Triton when a kernel is defined, so it has to be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from bpfree_kernels import backends

DEVICES = {"reference": ["cpu"], "cpp": ["cpu"], "triton": ["cpu"]}
if torch.cuda.is_available():
    DEVICES = {"reference": ["cpu", "cuda"], "cpp": ["cpu"], "triton": ["cuda"]}

TARGETS = [(backend, device) for backend, devices in DEVICES.items() for device in devices]


@pytest.fixture(params=TARGETS, ids=lambda target: "-".join(target))
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every (backend, device) pair that this machine can run; the test is skipped on the others."""
    backend, device = request.param
    state = backends.status(backend)
    if not state.usable:
        pytest.skip(f"{backend}: {state.reason}")
    return backend, device


@pytest.fixture
def poisoned() -> object:
    """Fill the memory that torch.empty hands out with NaN, so that an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
