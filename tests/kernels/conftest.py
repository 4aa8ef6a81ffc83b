"""The fixtures `dtype` and `shape`: what a backend supports, so that nothing is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bpfree_kernels import backends, checks

from . import cases

_INTERPRETER = ("triton", "cpu")
_PARENT = str(Path(__file__).parents[1] / "conftest.py")


@pytest.hookimpl(tryfirst=True)  # before pytest itself looks at the parameters of `target`
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Combine `target` with the dtypes and shapes that its backend supports.

    Tests marked ``native`` leave Triton's interpreter out, those marked ``op`` take that op's targets.
    """
    wanted = [name for name in ("dtype", "shape") if name in metafunc.fixturenames]
    native = metafunc.definition.get_closest_marker("native") is not None
    op = metafunc.definition.get_closest_marker("op")
    if "target" not in metafunc.fixturenames or not (wanted or native or op):
        return
    combinations, ids = [], []
    parent = metafunc.config.pluginmanager.get_plugin(_PARENT)
    for target in parent.targets_of(op.args[0] if op else parent.TYPICAL_OP):
        if native and target == _INTERPRETER:
            continue
        for values in _values(target, wanted):
            combinations.append((target, *values))
            ids.append("-".join([*target, *map(_name, values)]))
    indirect = ["target", *(["dtype"] if "dtype" in wanted else [])]
    # As a mark, because only a mark takes the place of the fixture's own parameters.
    metafunc.definition.add_marker(
        pytest.mark.parametrize(("target", *wanted), combinations, ids=ids, indirect=indirect)
    )


def _values(target: tuple[str, str], wanted: list[str]) -> list[tuple[object, ...]]:
    backend, device = target
    slow = target == _INTERPRETER
    dtypes = cases.supported_dtypes(backend, device) if "dtype" in wanted else (torch.float32,)
    combinations: list[tuple[object, ...]] = []
    for dtype in dtypes:
        if "shape" not in wanted:
            combinations.append((dtype,) if "dtype" in wanted else ())
            continue
        shapes = cases.INTERPRETED_SHAPES[dtype] if slow else cases.SHAPES
        combinations += [(dtype, s) if "dtype" in wanted else (s,) for s in shapes]
    return combinations


def _name(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that the target supports.

    Half precision on the CPU exists in the interpreter only. The argument checks, which know
    devices and not backends, would refuse it.
    """
    if request.param not in checks.CPU_DTYPES and backends.interpreting():
        monkeypatch.setattr(checks, "CPU_DTYPES", (*checks.CPU_DTYPES, request.param))
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled in one test is seen by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
