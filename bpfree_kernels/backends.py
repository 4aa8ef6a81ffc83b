"""Which body of an op runs, and why not another.

There are three bodies for every op:

* on the CPU ``cpp``: threaded, vectorised C++, in the compiled extension;
* on a GPU ``triton``: kernels for CUDA and ROCm tensors (and for CPU tensors in Triton's interpreter); or,
  for the inverses and invertible convolutions, ``cuda``: CUDA C++, in a compiled extension of its own;
* ``reference``: plain PyTorch, any device and dtype: the truth that the others are tested against.

The choice is made per device type, once, when the library is imported. It never changes silently: if
the body that a device should have is not there, the first call says so in one warning, and `explain`
says it at any time. Every public op takes ``backend=`` to choose for itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("cpp", "triton", "cuda", "reference")
"""Every backend name that ``backend=`` accepts."""

EXTENSION = Path(__file__).parent / "lib" / "libbpfree_cpu.so"
"""The compiled extension of the CPU, if it was built."""

CUDA_EXTENSION = EXTENSION.with_name("libbpfree_cuda.so")
"""The compiled extension of CUDA devices, if it was built."""

_DISABLE = "BPFREE_DISABLE"


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used in this process, and in one sentence why or why not."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class _Bodies:
    reference: Callable[..., Any]
    triton_module: str | None

    @property
    def gpu(self) -> str:
        """The backend that CUDA tensors should have."""
        return "cuda" if self.triton_module is None else "triton"


_bodies: dict[str, _Bodies] = {}


class BackendFallbackWarning(UserWarning):
    """A slower body than the device should have is running."""


def _disabled(backend: str) -> bool:
    names = [name.strip() for name in os.environ.get(_DISABLE, "").split(",") if name.strip()]
    unknown = set(names) - {"cpp", "triton", "cuda"}
    if unknown:
        raise ValueError(
            f"{_DISABLE} must name backends of cpp, triton and cuda, got {', '.join(sorted(unknown))}."
        )
    return backend in names


@functools.cache
def _load_extension() -> Status:
    return _load("cpp", EXTENSION, "a C++20 compiler")


@functools.cache
def _load_cuda_extension() -> Status:
    """Loaded whether or not there is a device: only with one do its kernels run."""
    if torch.version.hip is not None:
        return Status(False, "this torch is built for ROCm")
    return _load("cuda", CUDA_EXTENSION, "nvcc")


def _load(backend: str, library: Path, tool: str) -> Status:
    if _disabled(backend):
        return Status(False, f"switched off by {_DISABLE}={os.environ[_DISABLE]}")
    if not library.exists():
        return Status(
            False,
            f"the extension was not built ({library.name} is missing); with torch and {tool} "
            "at hand, in a clone, run: pip install --no-build-isolation --no-deps .",
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Status(False, f"the extension does not load: {error}")
    return Status(True, f"loaded {library.name}")


def _find_cuda() -> Status:
    loaded = _load_cuda_extension()
    if not loaded.usable or (torch.cuda.is_available() and torch.version.cuda is not None):
        return loaded
    return Status(False, f"{loaded.reason}, but torch sees no CUDA device")


@functools.cache
def _find_triton() -> Status:
    if _disabled("triton"):
        return Status(False, f"switched off by {_DISABLE}={os.environ[_DISABLE]}")
    if importlib.util.find_spec("triton") is None:
        return Status(False, "the package triton is not installed; run: pip install triton")
    if interpreting():
        return Status(True, "Triton's interpreter is on (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Status(False, "torch sees no CUDA or ROCm device")
    # Not the device's name: asking for it would start CUDA in every process that imports us.
    return Status(True, "compiles at first use")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def status(backend: str) -> Status:
    """Whether `backend` (one of `BACKENDS`) is usable here, with the reason.

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "cpp":
        return _load_extension()
    if backend == "triton":
        return _find_triton()
    if backend == "cuda":
        return _find_cuda()
    if backend == "reference":
        return Status(True, "plain PyTorch, always there")
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")


def default_for(device_type: str, op: str | None = None) -> str:
    """The backend that runs for tensors on a device type (``"cpu"``, ``"cuda"``, …).

    Args:
        device_type: the device type.
        op: name of an op; ``None`` stands for all whose GPU body is Triton's.
    """
    wanted = _wanted(device_type, op)
    return wanted if wanted is not None and status(wanted).usable else "reference"


def _wanted(device_type: str, op: str | None) -> str | None:
    """The backend written for a device type."""
    if device_type == "cuda":
        return "triton" if op is None else _bodies[op].gpu
    return "cpp" if device_type == "cpu" else None


def explain(device_type: str) -> str:
    """Which backend runs for tensors on a device type, and why not a faster one."""
    sentence = _explain(device_type, None)
    if device_type != "cuda":
        return sentence
    others = [name for name, bodies in _bodies.items() if bodies.gpu == "cuda"]
    return f"{sentence} For {', '.join(others)}, {_explain(device_type, others[0])}"


def _explain(device_type: str, op: str | None) -> str:
    chosen, wanted = default_for(device_type, op), _wanted(device_type, op)
    if wanted is None:
        return f"{device_type}: reference, because no kernels are written for this device."
    if chosen == wanted:
        return f"{device_type}: {chosen} ({status(chosen).reason})."
    return f"{device_type}: reference, because {wanted} is not usable: {status(wanted).reason}."


def ops() -> tuple[str, ...]:
    """The names of all registered ops."""
    return tuple(_bodies)


def bodies_of(op: str) -> tuple[str, ...]:
    """The backends that have a body of the op named `op`: C++, one for GPUs, and the reference."""
    return ("cpp", _bodies[op].gpu, "reference")


def register_bodies(
    library: torch.library.Library,
    name: str,
    reference: Callable[..., Any],
    triton_module: str | None,
) -> None:
    """Give an op its bodies: C++, Triton or CUDA where they are usable, the reference everywhere else.

    Args:
        library: the library that defines the op.
        name: the op's name; the Triton body has the same name in `triton_module`.
        reference: the plain PyTorch body.
        triton_module: module of the Triton body, imported at the first call that needs it; ``None`` if the
            GPU body is in the CUDA extension.
    """
    _bodies[name] = _Bodies(reference, triton_module)
    if default_for("cpu") == "reference":  # otherwise the extension has registered its own body
        library.impl(name, _warn_once(name, "cpu", reference), "CPU")
    if triton_module is not None:
        on_gpu = default_for("cuda")
        # Without a GPU nobody calls this body; whoever gets one later imports the library anew.
        gpu_body = _triton_body(name) if on_gpu == "triton" else _warn_once(name, "cuda", reference)
        library.impl(name, gpu_body, "CUDA")
    elif not _load_cuda_extension().usable:
        library.impl(name, _warn_once(name, "cuda", reference), "CUDA")
    library.impl(name, reference, "CompositeExplicitAutograd")


def body(name: str, device_type: str, backend: str | None) -> Callable[..., Any]:
    """The callable that runs op `name` on a device type: the registered op, or the backend asked for.

    Raises:
        ValueError: an unknown backend, or one that has no body of this op.
        RuntimeError: a backend that cannot run here, or not on this device type.
    """
    if backend is None:
        return getattr(torch.ops.bpfree, name).default  # type: ignore[no-any-return]
    state = status(backend)
    if backend not in (known := bodies_of(name)):
        raise ValueError(f"backend must be one of {', '.join(known)} for {name}, got {backend!r}.")
    if not state.usable:
        raise RuntimeError(f"backend {backend!r} is not usable: {state.reason}.")
    if backend == "reference":
        return _bodies[name].reference
    if backend == "triton":
        if device_type != "cuda" and not interpreting():
            raise RuntimeError(f"{_on_cuda(backend)}, got a tensor on {device_type}.")
        return _triton_body(name)
    if backend == "cuda" and device_type != "cuda":
        raise RuntimeError(f"{_on_cuda(backend)}, got a tensor on {device_type}.")
    if backend == "cpp" and device_type != "cpu":
        raise RuntimeError(f"backend 'cpp' runs on CPU tensors, got a tensor on {device_type}.")
    return getattr(torch.ops.bpfree, name).default  # type: ignore[no-any-return]


def _on_cuda(backend: str) -> str:
    return f"backend {backend!r} runs on CUDA tensors"


def _triton_body(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        module = importlib.import_module(str(_bodies[name].triton_module))
        return getattr(module, name)(*args)

    return run


def _warn_once(name: str, device_type: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference body of a device that should have a faster one: says so at the first call."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        _warn_fallback(device_type)
        return reference(*args)

    return run


@functools.cache
def _warn_fallback(device_type: str) -> None:
    warnings.warn(explain(device_type), BackendFallbackWarning, stacklevel=2)
