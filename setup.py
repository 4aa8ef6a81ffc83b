"""Builds bpfree-kernels: two Python packages and, where torch and a C++ compiler are there, an extension.

The build never fails for want of torch or a compiler: it then makes a pure-Python package and says so.
Nothing here looks for a GPU: the GPU kernels are Triton's and are compiled when they are first used.

Environment:
    CXX               the C++ compiler (default: c++)
    BPFREE_SANITIZE   e.g. "address,undefined": build the extension with these sanitizers
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = (2, 11)  # the stable ABI that the extension asks for: this torch and every later one
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}


def say(line: str) -> None:
    """A line of the build's account of itself; stderr, so that pip -v shows it."""
    print(f"bpfree-kernels: {line}", file=sys.stderr)


def why_no_extension() -> str | None:
    """The reason for a pure-Python build, or None if the extension can be built."""
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not installed in the build environment (--no-build-isolation?)"
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_TARGET:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_TARGET))}"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: {compiler()} is not on the PATH"
    if sys.platform != "linux":
        return f"the extension is built on Linux only, and this is {sys.platform}"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def sanitizer_flags() -> list[str]:
    names = os.environ.get("BPFREE_SANITIZE", "")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g1"]


def build_facts() -> list[str]:
    """What the extension reports about its own build (csrc/host.cpp), as macro definitions."""
    import torch

    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    facts = {
        "COMPILER": version.stdout.splitlines()[0],
        "TORCH_VERSION": torch.__version__,
        "TORCH_ABI": ".".join(map(str, TORCH_TARGET)),
        "SANITIZERS": os.environ.get("BPFREE_SANITIZE", "none"),
    }
    return [f"'-DBPFREE_{name}=\"{value}\"'" for name, value in facts.items()]


def write_ninja_file(build_dir: Path, library: Path, host: Path) -> None:
    """Write build.ninja: the torch library (kernels once per instruction set) and the host module."""
    import pybind11
    import torch
    from ninja.ninja_syntax import Writer

    torch_dir = Path(torch.__file__).parent
    major, minor = TORCH_TARGET
    common = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    common += sanitizer_flags()
    torch_flags = [
        f"-I{torch_dir / 'include'}",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        "-Wno-attributes",
    ]
    python_flags = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    isas = X86_ISAS if platform.machine() == "x86_64" else {"baseline": []}
    with (build_dir / "build.ninja").open("w") as file:
        n = Writer(file)
        n.rule("cxx", f"{compiler()} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d")
        n.rule("link", f"{compiler()} -shared $in $flags -o $out")
        csrc = ROOT / "csrc"
        objects = []

        def compile_(source: Path, name: str, flags: list[str]) -> str:
            out = f"{name}.o"
            n.build(out, "cxx", str(source), variables={"flags": " ".join(common + flags)})
            return out

        for isa, isa_flags in isas.items():
            source = csrc / "cpu" / "isa_kernels.cpp"
            objects.append(compile_(source, f"isa_{isa}", [*isa_flags, f"-DBPFREE_ISA={isa}"]))
        bodies = sorted((csrc / "cpu").glob("*.cpp"))
        bodies = [path for path in bodies if path.name != "isa_kernels.cpp"]
        bodies.append(csrc / "bindings.cpp")
        objects += [compile_(source, source.stem, torch_flags) for source in bodies]
        torch_link = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10 {' '.join(sanitizer_flags())}"
        n.build(str(library), "link", objects, variables={"flags": torch_link})
        host_object = compile_(csrc / "host.cpp", "host", python_flags + build_facts())
        host_link = " ".join(sanitizer_flags())
        n.build(str(host), "link", [host_object], variables={"flags": host_link})


class BuildExtension(build_ext):
    """Builds both shared libraries with ninja and puts them into the package."""

    def _outputs(self, package: Path) -> tuple[Path, Path]:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return package / "lib" / "libbpfree_cpu.so", package / f"_host{suffix}"

    def _package_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "bpfree_kernels"

    def run(self) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        built = self._outputs(build_dir)
        write_ninja_file(build_dir, *built)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)
        for source, target in zip(built, self._outputs(self._package_dir()), strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file in the old one's place: a process that runs the old one keeps it.
            partial = target.with_name(target.name + ".part")
            shutil.copy2(source, partial)
            os.replace(partial, target)
        oldest = ".".join(map(str, TORCH_TARGET))
        say(f"CPU extension: built with {compiler()}, for torch {oldest} and later.")
        say("GPU kernels: Triton's, compiled at first use; nothing to build.")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._outputs(self._package_dir()) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in-place builds are copied by run()


reason = why_no_extension()
if reason is not None:
    say(f"CPU extension: not built, because {reason}.")
    say("The package is pure Python: every op runs its plain PyTorch body on the CPU.")
version = re.search(r'__version__ = "(.+)"', (ROOT / "bpfree_kernels/_version.py").read_text())
setup(
    version=version.group(1),
    packages=[*find_packages(".", include=["bpfree_kernels*"]), *find_packages("python_api")],
    package_dir={"bpfree": "python_api/bpfree"},
    package_data={"bpfree_kernels": ["py.typed"], "bpfree": ["py.typed"]},
    # One entry stands for everything that BuildExtension makes.
    ext_modules=[Extension("bpfree_kernels._host", [])] if reason is None else [],
    cmdclass={"build_ext": BuildExtension},
)
