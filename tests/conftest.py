"""Set-up that every test shares: Triton's interpreter where there is no GPU, backends as a fixture."""

from __future__ import annotations

import os

import torch

# Read by Triton when a kernel is defined, so it has to be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from bpfree_kernels import backends

DEVICES: dict[str, list[str]] = {
    "cpp": ["cpu"],
    "triton": ["cpu"],
    "cuda": [],
    "reference": ["cpu"],
}
if torch.cuda.is_available():
    DEVICES |= {"triton": ["cuda"], "cuda": ["cuda"], "reference": ["cpu", "cuda"]}

TYPICAL_OP = "apply_update"
"""An op with the bodies that most have. Tests of others are marked ``op("their name")``."""


def targets_of(op: str) -> list[tuple[str, str]]:
    """The (backend, device) pairs of an op's bodies on this machine."""
    return [(backend, device) for backend in backends.bodies_of(op) for device in DEVICES[backend]]


@pytest.fixture(params=targets_of(TYPICAL_OP), ids=lambda target: "-".join(target))
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
