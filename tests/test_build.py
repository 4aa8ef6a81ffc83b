"""The build: what setup.py makes where torch is missing, and that the package works all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDE = "import sys\nsys.modules.update(dict.fromkeys({names!r}))  # importing them now fails\n"


def _run(arguments: list[str], *, path: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path), **env}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=True, cwd=cwd, env=environment,
    )  # fmt: skip


def _hide(folder: Path, *names: str) -> Path:
    """A folder that, on PYTHONPATH, makes Python believe that some packages are not installed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE.format(names=names))
    return folder


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `setup.py build` makes without torch, and what it says."""
    folder = tmp_path_factory.mktemp("build")
    hidden = _hide(folder / "hidden", "torch")
    arguments = ["setup.py", "-q", "build", "--build-base", str(folder), "--build-lib"]
    done = _run([*arguments, str(folder / "lib")], path=hidden, cwd=ROOT)
    return folder / "lib", done.stderr


def test_without_torch_the_build_is_pure_python(pure: tuple[Path, str]) -> None:
    library, _ = pure
    assert not list(library.rglob("*.so"))
    for package in ("bpfree_kernels", "bpfree"):
        assert (library / package / "__init__.py").exists()
        assert (library / package / "py.typed").exists()
    assert (library / "bpfree_kernels/ops/drtp.py").exists()
    assert (library / "bpfree/rules/drtp.py").exists()


def test_pure_python_package_computes_and_says_why_it_is_slow(
    pure: tuple[Path, str], tmp_path: Path
) -> None:
    library, _ = pure
    program = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bpfree_kernels, torch
    from bpfree_kernels import doctor
    facts = doctor.report()
fallbacks = [str(w.message) for w in caught if w.category.__name__ == "BackendFallbackWarning"]
print(json.dumps([bpfree_kernels.__file__, doctor.healthy(facts), facts["extension"], fallbacks]))
"""
    done = _run(["-c", program], path=library, cwd=tmp_path, TRITON_INTERPRET="0")
    file, healthy, extension, fallbacks = json.loads(done.stdout)
    assert Path(file).is_relative_to(library)
    assert healthy
    assert not extension["built"]
    assert "not built" in extension["reason"]
    assert not fallbacks  # the doctor asks for the reference by name


def test_build_says_what_it_left_out(pure: tuple[Path, str]) -> None:
    _, said = pure
    assert "torch is not installed" in said
    assert "pure Python" in said


def test_extension_of_this_checkout_is_loaded() -> None:
    """Every test against the C++ bodies would be skipped without it."""
    from bpfree_kernels import backends

    assert backends.status("cpp").usable, backends.status("cpp").reason
