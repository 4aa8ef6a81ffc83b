"""Which body runs, and what the library says about it. New processes see what import decides."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bpfree_kernels as bk
from bpfree_kernels import backends

from . import cases

ROOT = Path(bk.__file__).parents[1]

PRELUDE = """
import json, sys, warnings
warnings.simplefilter("always")
{before}
with warnings.catch_warnings(record=True) as caught:
    import torch
    import bpfree_kernels as bk
    def learn(backend=None):
        x, weight = torch.eye(2), torch.zeros(2, 2)
        feedback, labels = torch.tensor([[1.0, 2.0]]), torch.zeros(2, dtype=torch.int64)
        output = bk.drtp_linear_step(
            x, weight, None, feedback, labels, bk.SGD(0.5), activation="identity", backend=backend
        )
        bk.drtp_signal(output, feedback, labels, backend=backend)
        bk.classifier_grad(x, weight, None, labels, backend=backend)
        return weight.tolist()
    def error(backend):
        try:
            learn(backend)
        except Exception as error:
            return [type(error).__name__, str(error)]
    report = {{"weight": learn(), "again": learn(), "status": {{}}, "errors": {{}}}}
    for backend in bk.backends.BACKENDS:
        state = bk.backends.status(backend)
        report["status"][backend] = [state.usable, state.reason]
        report["errors"][backend] = error(backend)
report["explain"] = [bk.explain("cpu"), bk.explain("cuda")]
report["default"] = [bk.backends.default_for("cpu"), bk.backends.default_for("cuda")]
report["warnings"] = [
    str(w.message) for w in caught if issubclass(w.category, bk.BackendFallbackWarning)
]
report["modules"] = [name for name in sys.modules if name.split(".")[0] == "triton"]
report["modules"] += [name for name in sys.modules if name.startswith("bpfree_kernels.triton")]
print("REPORT", json.dumps(report))
"""

LEARNT = [[-0.5, -0.5], [-1.0, -1.0]]
"""−lr · Bᵀ1ᵀ: what the two samples of `PRELUDE` teach every body."""


def report(before: str = "", **environment: str) -> dict[str, Any]:
    """Import and use the library in a new process; returns what it saw there."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("BPFREE_DISABLE", "TRITON_INTERPRET")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(before=before)],
        env={**variables, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.split("REPORT ", 1)[1]
    seen: dict[str, Any] = json.loads(line)
    return seen


def test_without_the_extension() -> None:
    """Switched off, the extension gives way to the reference, and exactly one warning says so."""
    seen = report(BPFREE_DISABLE="cpp")
    assert seen["weight"] == seen["again"] == LEARNT
    assert seen["default"][0] == "reference"
    assert len(seen["warnings"]) == 1
    for sentence in (seen["warnings"][0], seen["explain"][0]):
        for word in ("cpu", "reference", "cpp", "switched off", "BPFREE_DISABLE=cpp"):
            assert word in sentence
    kind, message = seen["errors"]["cpp"]
    assert kind == "RuntimeError"
    assert "'cpp'" in message
    assert "BPFREE_DISABLE=cpp" in message
    assert seen["errors"]["reference"] is None


def test_without_triton() -> None:
    """With no package of that name to import, everything but ``backend="triton"`` works."""
    seen = report(before="sys.modules['triton'] = None")
    assert seen["weight"] == LEARNT
    assert [name for name in seen["modules"] if name != "triton"] in (
        [],
        ["bpfree_kernels.triton"],
    )
    assert seen["status"]["triton"][0] is False
    assert "pip install triton" in seen["status"]["triton"][1]
    kind, message = seen["errors"]["triton"]
    assert kind == "RuntimeError"
    assert "'triton'" in message
    assert "not installed" in message


def test_with_everything_switched_off() -> None:
    """A comma-separated list switches off several backends; the reference is always there."""
    seen = report(BPFREE_DISABLE="cpp,triton, cuda", TRITON_INTERPRET="1")
    assert seen["weight"] == LEARNT
    assert seen["default"] == ["reference", "reference"]
    assert [seen["status"][name][0] for name in backends.BACKENDS] == [False, False, False, True]
    for name in ("triton", "cuda"):
        assert "switched off" in seen["status"][name][1]
    assert len(seen["warnings"]) == 1
    assert seen["modules"] == []


def test_as_installed() -> None:
    """With nothing switched off: no Triton import before it is needed, and no needless warning."""
    seen = report(TRITON_INTERPRET="0")
    assert seen["weight"] == LEARNT
    assert seen["modules"] == []
    assert "no CUDA or ROCm device" in seen["status"]["triton"][1]
    kind, message = seen["errors"]["triton"]
    assert kind == "RuntimeError"
    assert "no CUDA" in message
    assert "reference" in seen["explain"][1]
    if seen["status"]["cpp"][0]:
        assert seen["warnings"] == []
        assert seen["default"][0] == "cpp"
        assert seen["errors"]["cpp"] is None


def test_status_of_each_backend() -> None:
    """Every backend has a status with a reason; other names are an error that lists the names."""
    for backend in backends.BACKENDS:
        state = backends.status(backend)
        assert isinstance(state.usable, bool)
        assert len(state.reason) > 10
    assert backends.status("reference").usable
    with pytest.raises(ValueError, match=r"cpp, triton, cuda, reference, got 'xpu'"):
        backends.status("xpu")


EXTENSIONS = {
    "cpp": ("EXTENSION", backends._load_extension, "C++20 compiler"),
    "cuda": ("CUDA_EXTENSION", backends._load_cuda_extension, "nvcc"),
}


@pytest.mark.parametrize("backend", EXTENSIONS)
def test_an_extension_that_is_missing_or_broken(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not built: how to build it, and what with. Built for something else: what the loader says."""
    attribute, cached, tool = EXTENSIONS[backend]
    library = tmp_path / getattr(backends, attribute).name
    monkeypatch.delenv("BPFREE_DISABLE", raising=False)
    monkeypatch.setattr(backends, attribute, library)
    monkeypatch.setattr(torch.version, "hip", None)
    load = cached.__wrapped__
    missing = load()
    assert not missing.usable
    for words in (f"{library.name} is missing", tool, "pip install"):
        assert words in missing.reason
    library.write_text("not a library")
    broken = load()
    assert not broken.usable
    assert "does not load" in broken.reason
    monkeypatch.setenv("BPFREE_DISABLE", f"triton,{backend}")
    assert load() == backends.Status(False, f"switched off by BPFREE_DISABLE=triton,{backend}")


def test_cuda_bodies_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm loads no CUDA library; a library without a device is no usable backend, and says so."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in backends._load_cuda_extension.__wrapped__().reason
    loaded = backends.Status(True, "loaded libbpfree_cuda.so")
    monkeypatch.setattr(backends, "_load_cuda_extension", lambda: loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = backends.status("cuda")
    assert not state.usable
    assert "no CUDA device" in state.reason


def test_an_unknown_backend_is_not_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a slip in it must not leave on what was meant to be off."""
    monkeypatch.setenv("BPFREE_DISABLE", "cpp,trition")
    with pytest.raises(ValueError, match=r"BPFREE_DISABLE.*cpp, triton and cuda, got trition"):
        backends._load_extension.__wrapped__()


GAIT = {
    "orthogonality", "solve_nearly_orthogonal", "refine_inverse", "orthogonal_update",
    "invertible_conv_reconstruct", "invertible_conv_error",
}  # fmt: skip
"""The ops whose GPU body is CUDA C++."""


def test_bodies_of_each_op() -> None:
    """Each op has one body for GPUs: Triton's is there by the op's name, CUDA's for those of GAIT-prop."""
    assert set(backends.ops()) >= GAIT
    for op in backends.ops():
        gpu = "cuda" if op in GAIT else "triton"
        assert backends.bodies_of(op) == ("cpp", gpu, "reference")


def test_triton_bodies_are_where_they_are_looked_for() -> None:
    """The module that an op names has a function of the op's name."""
    if not backends.status("triton").usable:
        pytest.skip(backends.status("triton").reason)
    for op in set(backends.ops()) - GAIT:
        module = importlib.import_module(backends._bodies[op].triton_module)
        assert callable(getattr(module, op))


def test_ops_with_other_bodies_are_explained() -> None:
    """What the choice is for the ops that Triton has no body of, and why; named one by one."""
    seen = report(BPFREE_DISABLE="cuda")
    reason = "because cuda is not usable: switched off by BPFREE_DISABLE=cuda."
    rest, gait = seen["explain"][1].split(" For ")
    assert rest.startswith("cuda: reference, because triton is not usable")
    assert set(gait.split(", cuda: ")[0].split(", ")) == GAIT
    assert gait.endswith(f", cuda: reference, {reason}")


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps", "xpu", "meta"])
def test_explanations_fit_the_choice(device_type: str) -> None:
    """`explain` names what `default_for` chooses, for devices without kernels too."""
    chosen, sentence = backends.default_for(device_type), bk.explain(device_type)
    assert sentence.startswith(f"{device_type}: {chosen}")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    if device_type in ("mps", "xpu", "meta"):
        assert chosen == "reference"


def test_the_body_that_is_asked_for() -> None:
    """``backend=`` reaches the body that it names."""
    name = "drtp_linear_step"
    assert backends.body(name, "cpu", "reference").__module__ == "bpfree_kernels.reference.drtp"
    assert backends.body(name, "cpu", None) is torch.ops.bpfree.drtp_linear_step.default
    if backends.status("cpp").usable:
        assert backends.body(name, "cpu", "cpp") is torch.ops.bpfree.drtp_linear_step.default


def test_a_backend_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ on a GPU's tensors, compiled Triton on the CPU's: an error that names both."""
    monkeypatch.setattr(backends, "status", lambda _: backends.Status(True, "pretending"))
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="'cpp' runs on CPU tensors, got a tensor on cuda"):
        backends.body("drtp_signal", "cuda", "cpp")
    for op, backend in (("drtp_signal", "triton"), ("orthogonality", "cuda")):
        wanted = f"'{backend}' runs on CUDA tensors, got a tensor on cpu"
        with pytest.raises(RuntimeError, match=wanted):
            backends.body(op, "cpu", backend)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_triton_refuses_float64(family: str) -> None:
    """Its accumulators are float32: less than asked for is an error, and nothing has changed."""
    if not backends.status("triton").usable:
        pytest.skip(backends.status("triton").reason)
    case = cases.FAMILIES[family](dtype=torch.float64)
    snapshot = cases.Snapshot(case.tensors)
    for call in (lambda: case.grad("triton"), lambda: case.step(bk.SGD(0.1), None, "triton")):
        with pytest.raises(TypeError, match=r"triton.*float64"):
            call()
    snapshot.check_unchanged()


def test_triton_refuses_float64_in_other_ops() -> None:
    """Those that are no learning layer: forward passes, signals, updates."""
    if not backends.status("triton").usable:
        pytest.skip(backends.status("triton").reason)
    dense, local = (make(dtype=torch.float64) for make in (cases.dense_case, cases.local_conv_case))
    x, w, b = (dense.tensors[name] for name in ("pre", "weight", "bias"))
    maps, kernels, signal = (local.tensors[name] for name in ("x", "weight", "signal"))
    labels = torch.zeros(len(x), dtype=torch.int64)
    place = {"stride": (2, 1), "padding": (1, 0), "backend": "triton"}
    snapshot = cases.Snapshot({**dense.tensors, **local.tensors})
    for call in (
        lambda: bk.apply_update(w, w * 2, bk.SGD(0.1), backend="triton"),
        lambda: bk.dense_forward(x, w, b, backend="triton"),
        lambda: bk.classifier_forward(x, w, b, labels, backend="triton"),
        lambda: bk.drtp_signal(x, x[:2], labels, backend="triton"),
        lambda: bk.pepita_difference(x, x * 2, backend="triton"),
        lambda: bk.local_conv_forward(maps, kernels, **place),
        lambda: bk.local_conv_feedback(signal, kernels, (3, 2), **place),
        lambda: bk.local_conv(maps, kernels, **place),
    ):
        with pytest.raises(TypeError, match=r"triton.*float64"):
            call()
    snapshot.check_unchanged()


def test_tensors_without_memory() -> None:
    """Meta tensors, for planning: the shapes of a step, as of any torch function."""
    case = cases.drtp_case()
    planned = case.using(**{name: t.to("meta") for name, t in case.tensors.items()})
    rule = bk.Adam(0.1)
    state = rule.new_state(planned.weight, planned.bias)
    (output,) = planned.step(rule, state)
    assert output.is_meta
    assert output.shape == (5, 6)
    assert [t.shape for t in planned.grad()[1:]] == [(6, 7), (6,)]


def test_label_checks_on_the_gpu_are_off_by_default() -> None:
    """The switch exists and is remembered; on the CPU labels are checked whatever it says."""
    assert bk.checks._check_labels_on_gpu is False
    labels = torch.tensor([3])
    try:
        for on in (True, False):
            bk.set_label_checks(on_gpu=on)
            assert bk.checks._check_labels_on_gpu is on
            with pytest.raises(IndexError, match="got 3 at position 0"):
                bk.drtp_signal(torch.zeros(1, 2), torch.zeros(3, 2), labels)
    finally:
        bk.set_label_checks(on_gpu=False)


def test_importing_starts_no_cuda() -> None:
    """A context on the first GPU in every process would cost memory, and forbid it to fork."""
    program = "import bpfree_kernels, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
