"""``python -m bpfree_kernels``: what was built, what runs on this machine, and whether it computes right."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree_kernels import backends
from bpfree_kernels._version import __version__
from bpfree_kernels.examples import EXAMPLES, example_args

SMOKE_TOLERANCE = 1e-5
"""Largest difference from the reference, relative to its largest value, that a smoke test passes."""


def report() -> dict[str, Any]:
    """Everything the doctor knows, as plain values that `json` can write."""
    return {
        "versions": versions(),
        "machine": _machine(),
        "extension": _extension("cpp", backends.EXTENSION),
        "cuda_extension": _extension("cuda", backends.CUDA_EXTENSION),
        "backends": {name: vars(backends.status(name)) for name in backends.BACKENDS},
        "choices": {device: backends.explain(device) for device in ("cpu", "cuda")},
        "problems": _problems(),
        "smoke": _smoke_tests(),
    }


def healthy(facts: dict[str, Any]) -> bool:
    """Whether every smoke test of a report passed and nothing that is there lies idle."""
    return not facts["problems"] and all(test["ok"] for test in facts["smoke"])


def _problems() -> list[str]:
    """What this machine has and the library does not use, unless it was switched off on purpose."""
    idle = []
    if backends.EXTENSION.exists() and backends.default_for("cpu") != "cpp":
        idle.append(backends.explain("cpu"))
    if torch.cuda.is_available() and backends.default_for("cuda") != "triton":
        idle.append(backends.explain("cuda"))
    if backends.CUDA_EXTENSION.exists() and torch.cuda.is_available():
        cuda = backends.status("cuda")
        if not cuda.usable:
            idle.append(f"the CUDA extension lies idle: {cuda.reason}.")
    return [sentence for sentence in idle if "switched off" not in sentence]


def versions() -> dict[str, str]:
    """Versions of the library and of what it stands on."""
    found = {"bpfree-kernels": __version__, "python": platform.python_version()}
    found["torch"] = torch.__version__  # says more than the metadata: +cpu, +cu130
    for package in ("triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda or "none",
        "hip": getattr(torch.version, "hip", None) or "none",
    }


def _extension(backend: str, library: Path) -> dict[str, Any]:
    """What a backend's compiled extension says of its build."""
    if not library.exists():
        return {"built": False, "reason": backends.status(backend).reason}
    try:
        from bpfree_kernels import _host
    except ImportError:  # the kernels serve every Python, this module only the one it was built for
        return {"built": True, "reason": "built for another Python: no build facts"}
    if backend == "cuda":
        return {"built": True, **_host.cuda_build()}
    return {"built": True, **_host.build(), "processor": _host.processor()}


def _smoke_tests() -> list[dict[str, Any]]:
    """Each op on each usable backend that has a body of it, against the reference body in float64."""
    results = []
    for backend in backends.BACKENDS:
        if not backends.status(backend).usable or (backend == "triton" and _no_triton_device()):
            continue
        on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
        device = "cuda" if on_gpu else "cpu"
        for name in EXAMPLES:
            if backend not in backends.bodies_of(name):
                continue
            result: dict[str, Any] = {"op": name, "backend": backend, "device": device}
            try:
                error = _smoke_error(name, backend, device)
                result |= {"error": error, "ok": error <= SMOKE_TOLERANCE}
            except Exception as error:  # whatever it is, it is what the doctor was asked for
                result |= {"error": f"{type(error).__name__}: {error}", "ok": False}
            results.append(result)
    return results


def _no_triton_device() -> bool:
    return not torch.cuda.is_available() and not backends.interpreting()


def _smoke_error(name: str, backend: str, device: str) -> float:
    args, wanted_args = example_args(name, device), example_args(name, "cpu", torch.float64)
    got = backends.body(name, device, backend)(*args)
    wanted = backends.body(name, "cpu", "reference")(*wanted_args)
    errors = [
        float((a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(_tensors(got, args), _tensors(wanted, wanted_args), strict=True)
    ]
    return max(errors)


def _tensors(result: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What a call returned and what it may have changed."""
    returned = result if isinstance(result, tuple) else (result,)
    return [t for t in (*returned, *args) if isinstance(t, Tensor) and t.is_floating_point()]


def render(facts: dict[str, Any]) -> str:
    """A report as text."""
    lines = []
    for title in ("versions", "machine", "extension", "cuda_extension"):
        lines.append(f"{title.replace('_', ' ')}:")
        lines += [f"  {name}: {_flat(value)}" for name, value in facts[title].items()]
    lines.append("backends:")
    for name, state in facts["backends"].items():
        lines.append(
            f"  {name}: {'usable' if state['usable'] else 'not usable'}, {state['reason']}"
        )
    lines += ["choices:", *(f"  {sentence}" for sentence in facts["choices"].values())]
    lines.append("smoke tests (largest difference from the float64 reference):")
    for test in facts["smoke"]:
        verdict = "ok" if test["ok"] else "WRONG"
        error = test["error"] if isinstance(test["error"], str) else f"{test['error']:.1e}"
        lines.append(f"  {verdict:5} {test['backend']:9} {test['op']:28} {error}")
    lines += [f"problem: {sentence}" for sentence in facts["problems"]]
    lines.append("all well." if healthy(facts) else "something is wrong: see above.")
    return "\n".join(lines)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    """The command line: text, or JSON with ``--json``; exit status 1 if a smoke test failed."""
    import argparse
    import json

    parser = argparse.ArgumentParser(prog="python -m bpfree_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    facts = report()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0 if healthy(facts) else 1


if __name__ == "__main__":
    sys.exit(main())
