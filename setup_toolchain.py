"""Where the compilers and headers are that setup.py builds with."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIN_CUDA = (12, 4)


class BuildError(SystemExit):
    """Ends the build with one readable message instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"liquidgemm: {message}")


def run_quietly(*command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def package_dir(name: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"the build needs `pip install {requirement}`")
    return Path(spec.submodule_search_locations[0])


def torch_dir() -> Path:
    return package_dir("torch", "'torch>=2.10'")


def cutlass_include() -> Path:
    return package_dir("cutlass_library", "--no-deps nvidia-cutlass==4.2.0.0") / "source/include"


def nvcc_candidates() -> list[Path]:
    """Every nvcc there is: CUDA_HOME's, then PATH's, then the one of the PyPI wheels."""
    found = []
    if home := os.environ.get("CUDA_HOME"):
        found.append(Path(home) / "bin/nvcc")
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    if (wheels := importlib.util.find_spec("nvidia")) and wheels.submodule_search_locations:
        for place in wheels.submodule_search_locations:
            found += sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True)
    return [nvcc for nvcc in found if os.access(nvcc, os.X_OK)]


def nvcc_version(nvcc: Path) -> tuple[int, ...]:
    """(major, minor), or () from a file that is not a working nvcc."""
    try:
        report = run_quietly(nvcc, "--version").stdout
    except OSError:
        return ()
    release = re.search(r"release (\d+)\.(\d+)", report)
    return tuple(map(int, release.groups())) if release else ()


def find_nvcc() -> Path | None:
    """The first nvcc in the search order that is new enough for the kernels."""
    return next((nvcc for nvcc in nvcc_candidates() if nvcc_version(nvcc) >= MIN_CUDA), None)


@dataclass(frozen=True)
class Toolchain:
    cxx: str
    nvcc: Path
    cuda: Path
    torch: Path
    cutlass: Path

    @classmethod
    def find(cls) -> "Toolchain":
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            raise BuildError(f"no C++ compiler: {cxx} is not on PATH (Debian: apt-get install g++)")
        nvcc = find_nvcc()
        if nvcc is None:
            too_old = "".join(f"; {nvcc} is too old" for nvcc in nvcc_candidates())
            raise BuildError(
                f"no nvcc {'.'.join(map(str, MIN_CUDA))} or newer in $CUDA_HOME/bin, on PATH or in "
                f"the PyPI wheels (pip install --group nvcc){too_old}"
            )
        # nvcc knows best where its toolkit lies: the command may be a link or a wrapper script.
        dry_run = run_quietly(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
        cuda = Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent
        return cls(cxx, nvcc, cuda, torch_dir(), cutlass_include())

    def cuda_file(self, *names: str) -> Path:
        """The first of several places below the toolkit that exists: layouts differ."""
        for pattern in names:
            if match := sorted(self.cuda.glob(pattern)):
                return match[0]
        raise BuildError(f"{names[0]} is missing below {self.cuda}: is the CUDA toolkit complete?")

    def includes(self, root: Path) -> list[str]:
        """-I for the headers of the checkout at `root`, -isystem for others, whose warnings are not
        ours to mend."""
        cuda_include = self.cuda_file(
            "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h"
        ).parent
        system = [
            self.torch / "include",
            self.torch / "include/torch/csrc/api/include",
            self.cutlass,
            cuda_include,
            cuda_include / "cccl",
        ]
        flags = [f"-I{root / 'csrc'}"]
        for folder in system:
            flags += ["-isystem", str(folder)]
        return flags

    def cudart(self) -> list[str]:
        library = "libcudart_static.a"
        path = self.cuda_file(f"lib64/{library}", f"lib/{library}", f"targets/*/lib/{library}")
        return [str(path), f"-Wl,--exclude-libs,{library}", "-ldl", "-lpthread", "-lrt"]
