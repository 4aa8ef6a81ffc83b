"""Builds bpfree-kernels: two Python packages and, where torch and compilers are there, their extensions.

With torch and a C++ compiler that is the CPU extension, with nvcc also the CUDA extension. The build never
fails for want of any of them: it makes what it can and says what it left out. Nothing here looks for a GPU:
the CUDA extension is compiled for every architecture in `CUDA_ARCHITECTURES`, and loads without one. (Most
GPU kernels are Triton's, and are compiled when they are first used.)

Environment:
    CXX               the C++ compiler (default: c++)
    NVCC              the CUDA compiler (default: nvcc, on the PATH or in CUDA_HOME)
    BPFREE_SANITIZE   e.g. "address,undefined": build the CPU extension alone, with these sanitizers
"""

from __future__ import annotations

import functools
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

CUDA_ARCHITECTURES = (80, 90, 100)  # and, for all later ones, PTX of the last


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


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), toolkit])
    return shutil.which(os.environ.get("NVCC", "nvcc"), path=path)


def why_no_cuda_extension() -> str | None:
    """The reason for a build without the CUDA extension, or None if it can be built."""
    import torch

    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if os.environ.get("BPFREE_SANITIZE"):
        return "the sanitizers are for the CPU kernels"
    if nvcc() is None:
        return "there is no nvcc on the PATH or in CUDA_HOME"
    if not cuda_architectures():
        return f"{nvcc()} knows none of the architectures {CUDA_ARCHITECTURES}"
    return None


@functools.cache
def cuda_architectures() -> tuple[int, ...]:
    """Those of `CUDA_ARCHITECTURES` that nvcc knows."""
    known = subprocess.check_output([str(nvcc()), "--list-gpu-code"], text=True).split()
    return tuple(number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known)


def cuda_flags() -> list[str]:
    """What nvcc gets beside the flags of every torch source."""
    numbers = cuda_architectures()
    codes = {number: f"sm_{number}" for number in numbers}
    codes[numbers[-1]] += f",compute_{numbers[-1]}"
    flags = [f"-gencode 'arch=compute_{n},code=[{code}]'" for n, code in codes.items()]
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wno-attributes"
    return ["-std=c++20", "-O3", f"-ccbin {compiler()}", f"-Xcompiler {host}", *flags]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("BPFREE_SANITIZE", "")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g1"]


def build_facts() -> list[str]:
    """What the extension reports about its own build (csrc/host.cpp), as macro definitions."""
    import torch

    def version(program: str, line: int) -> str:
        return subprocess.check_output([program, "--version"], text=True).splitlines()[line]

    cuda = why_no_cuda_extension() is None
    facts = {
        "COMPILER": version(compiler(), 0),
        "NVCC": version(str(nvcc()), -2) if cuda else "none",
        "CUDA_ARCHITECTURES": " ".join(f"sm_{n}" for n in cuda_architectures()) if cuda else "none",
        "TORCH_VERSION": torch.__version__,
        "TORCH_ABI": ".".join(map(str, TORCH_TARGET)),
        "SANITIZERS": os.environ.get("BPFREE_SANITIZE", "none"),
    }
    return [f"'-DBPFREE_{name}=\"{value}\"'" for name, value in facts.items()]


def write_ninja_file(build_dir: Path, libraries: dict[str, Path]) -> None:
    """Write build.ninja: the CPU library (kernels once per instruction set), CUDA's, and the host module."""
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
    ]
    body_flags = [*common, *torch_flags, "-Wno-attributes"]
    python_flags = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    isas = X86_ISAS if platform.machine() == "x86_64" else {"baseline": []}
    csrc = ROOT / "csrc"
    with (build_dir / "build.ninja").open("w") as file:
        n = Writer(file)
        n.rule("cxx", f"{compiler()} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d")
        n.rule("link", "$linker -shared $in $flags -o $out")

        def compile_(source: Path, name: str, flags: list[str], rule: str = "cxx") -> str:
            n.build(f"{name}.o", rule, str(source), variables={"flags": " ".join(flags)})
            return f"{name}.o"

        def link(library: str, objects: list[str], flags: str, linker: str = compiler()) -> None:
            variables = {"linker": linker, "flags": " ".join([flags, *sanitizer_flags()])}
            n.build(str(libraries[library]), "link", objects, variables=variables)

        objects = []
        for isa, isa_flags in isas.items():
            source = csrc / "cpu" / "isa_kernels.cpp"
            flags = [*common, *isa_flags, f"-DBPFREE_ISA={isa}"]
            objects.append(compile_(source, f"isa_{isa}", flags))
        bodies = sorted((csrc / "cpu").glob("*.cpp"))
        bodies = [path for path in bodies if path.name != "isa_kernels.cpp"]
        bodies.append(csrc / "bindings.cpp")
        objects += [compile_(source, source.stem, body_flags) for source in bodies]
        link("cpu", objects, f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10")
        host_object = compile_(csrc / "host.cpp", "host", common + python_flags + build_facts())
        link("host", [host_object], "")
        if "cuda" in libraries:
            n.rule("nvcc", f"{nvcc()} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d")
            flags = [*cuda_flags(), *torch_flags, "-DUSE_CUDA"]
            sources = sorted((csrc / "cuda").glob("*.cu"))
            objects = [compile_(path, f"cuda_{path.stem}", flags, "nvcc") for path in sources]
            objects.append(compile_(csrc / "cuda" / "bindings.cpp", "cuda_bindings", body_flags))
            # libtorch stands for all of torch's libraries: one of them has CUDA's streams, if any has.
            torch_link = f"-L{torch_dir / 'lib'} -Xlinker --no-as-needed -ltorch -ltorch_cpu -lc10"
            link(
                "cuda",
                objects,
                f"-nodlink -cudart static -ccbin {compiler()} {torch_link}",
                str(nvcc()),
            )


class BuildExtension(build_ext):
    """Builds the shared libraries with ninja and puts them into the package."""

    def _outputs(self, package: Path) -> dict[str, Path]:
        outputs = {
            "cpu": package / "lib" / "libbpfree_cpu.so",
            "host": package / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}",
        }
        if why_no_cuda_extension() is None:
            outputs["cuda"] = package / "lib" / "libbpfree_cuda.so"
        return outputs

    def _package_dir(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "bpfree_kernels"

    def run(self) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        built = self._outputs(build_dir)
        write_ninja_file(build_dir, built)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)
        for name, target in self._outputs(self._package_dir()).items():
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file in the old one's place: a process that runs the old one keeps it.
            partial = target.with_name(target.name + ".part")
            shutil.copy2(built[name], partial)
            os.replace(partial, target)
        oldest = ".".join(map(str, TORCH_TARGET))
        say(f"CPU extension: built with {compiler()}, for torch {oldest} and later.")
        without = why_no_cuda_extension()
        if without is None:
            kinds = ", ".join(f"sm_{number}" for number in cuda_architectures())
            say(f"CUDA extension: built with {nvcc()} for {kinds}.")
        else:
            say(f"CUDA extension: not built, because {without}.")
        say("Other GPU kernels: Triton's, compiled at first use; nothing to build.")

    def get_outputs(self) -> list[str]:
        outputs = self._outputs(self._package_dir()).values()
        return [str(path) for path in outputs if path.exists()]

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
