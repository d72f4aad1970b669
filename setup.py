"""Builds the two shared libraries of liquidgemm, for every Python and every torch >= 2.10 alike.

    liquidgemm/_C_host.so   plain C++: works wherever torch does
    liquidgemm/_C_cuda.so   the Hopper kernels (sm_90a)

Both bind to torch's stable ABI and need no Python.h, so the wheel is tagged py3-none-<platform>.
The build needs g++, nvcc and the headers of torch and CUTLASS: no GPU, no driver, no CUDA build of
torch. torch.utils.cpp_extension is not used, because it refuses to compile CUDA on a CPU-only
torch and links libraries that such a torch does not have.

ninja does the compiling, in a folder below build/ that is kept: the second build takes seconds.
"""

import fcntl
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

from setup_toolchain import BuildError, Toolchain, run_quietly  # noqa: E402

# The CPU kernels of each instruction set, chosen at run time (csrc/liquidgemm/cpu/kernels.hpp).
X86_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (
    *X86_FLAGS,
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")),
    "-Wno-uninitialized",  # GCC warns of its own headers
    "-Wno-maybe-uninitialized",
)
CPU_FLAGS_OF = {
    "x86_64": {
        "avx2": X86_FLAGS,
        "avx_vnni": (*X86_FLAGS, "-mavxvnni"),
        "avx512_vnni": AVX512_FLAGS,
        "amx": (*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
        "neon_i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    },
}
CPU_FLAGS = CPU_FLAGS_OF.get(platform.machine(), {})
CPU_COMMON = ("experts", "gemm", "kernels", "portable", "processor", "producers")
# Every operation is rounded, and none of them traps or sets errno: so loops can become vectors.
CPU_CXX_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")

# The sources of each library: every pattern must match at least one file.
SOURCES = {
    "liquidgemm._C_host": [
        "csrc/torch/host/*.cpp",
        *(f"csrc/liquidgemm/cpu/{name}.cpp" for name in (*CPU_COMMON, *CPU_FLAGS)),
    ],
    "liquidgemm._C_cuda": [
        "csrc/torch/cuda/*.cpp",
        "csrc/liquidgemm/host/*.cpp",
        "csrc/liquidgemm/*/*.cu",
        "csrc/instantiations/*/*.cu",
    ],
}

# Tiles that are compiled together: nine tenths of what one takes are the headers of CUTLASS.
TILES_PER_UNIT = 6
TILES_ALONE = ("t224_p2_k1_s2",)  # beside others it becomes other machine code than alone

DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DNDEBUG"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90",  # or CUTLASS's wrappers, if they are used, do nothing
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",  # also kernels with line numbers, which are three times as large
    "-Xptxas=-v",  # check_ptxas_report reads what this prints
]
# torch opens its libraries RTLD_LOCAL, so ours must name libtorch.so itself or the symbols of its
# CUDA side are not found at load; none of ours needs it at link time, hence --no-as-needed.
LINK_FLAGS = ["-shared", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]


# --------------------------------------------------------------------------------------------------
# What ptxas says about the kernels


def demangle(text: str) -> str:
    """C++ names as they were written, where binutils' c++filt is there."""
    if shutil.which("c++filt") is None:
        return text
    return run_quietly("c++filt", stdin=text).stdout


def check_ptxas_report(report: str) -> list[str]:
    """The sentences that condemn a build in the output of `nvcc -Xptxas=-v`.

    Registers spilled to memory, and ptxas' "Potential Performance Loss" notes: C7508 (setmaxnreg
    ignored), C7510 (wgmma serialized) and their kin. A kernel with any of them is right but slow,
    which no test would notice.
    """
    if "ptxas info" not in report:
        return ["no report from ptxas: was it run with -v?"]
    problems = []
    kernel = "?"
    for line in report.splitlines():
        if name := re.search(r"Function properties for (\S+)", line):
            kernel = name[1]
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if spill[1] != "0" or spill[2] != "0":
                problems.append(f"{kernel} spills registers: {spill[0]}")
        elif re.search(r"\(C75\d\d\)|Potential Performance Loss", line):
            problems.append(line.split(":", 1)[-1].strip())
    return problems


# --------------------------------------------------------------------------------------------------
# The build


def source_files(extension: str) -> list[Path]:
    """The sources of one library, in a stable order."""
    files = {pattern: sorted(ROOT.glob(pattern)) for pattern in SOURCES[extension]}
    if missing := [pattern for pattern, matches in files.items() if not matches]:
        raise BuildError(f"{extension} cannot be built: no file matches {', '.join(missing)}")
    return [file for matches in files.values() for file in matches]


def units(extension: str) -> dict[str, list[Path]]:
    """The sources that one call of a compiler takes, by the name of what it makes, without .o."""
    found = {}
    for room, files in itertools.groupby(source_files(extension), lambda file: file.parent):
        sources = list(files)
        holds_tiles = room.parent.name == "instantiations"
        count = -(-len(sources) // (TILES_PER_UNIT if holds_tiles else 1))
        for i in range(count):
            unit = sources[i::count]
            alone = [[source] for source in unit if source.stem in TILES_ALONE]
            together = [source for source in unit if [source] not in alone]
            for unit in filter(None, (*alone, together)):
                file = unit[0] if len(unit) == 1 else room / f"tiles_{i}.cu"
                found[str(file.relative_to(ROOT))] = unit
    return found


def write_unit(path: Path, sources: list[Path]) -> Path:
    """The source of a unit: if it has several, a file at `path` that includes them."""
    if len(sources) == 1:
        return sources[0]
    text = "".join(f'#include "{source}"\n' for source in sources)
    if not path.exists() or path.read_text() != text:  # or ninja would compile it again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def cpu_flags(source: Path) -> tuple[str, ...]:
    """What a source of the CPU kernels is compiled with besides CXX_FLAGS."""
    if source.parent.name != "cpu":
        return ()
    return (*CPU_CXX_FLAGS, *CPU_FLAGS.get(source.stem, ()))


def cuda_flags(source: Path) -> tuple[str, ...]:
    """What a source of kernels is compiled with besides NVCC_FLAGS."""
    # Line numbers are for profilers and sanitizers. With them comes the text of all PTX, which for
    # the many shapes of decode attention would be 3 MB.
    return () if source.parent.name == "attention" else ("-lineinfo",)


def write_build_file(tools: Toolchain, folder: Path, extensions: list[str]) -> list[Path]:
    """Writes build.ninja; returns the files that will hold the reports of ptxas."""
    from ninja import ninja_syntax  # absent where only the metadata is asked for

    def command(*words: object) -> str:
        return shlex.join(str(word) for word in words).replace("$", "$$")

    common = [*DEFINES, *tools.includes(ROOT)]
    nvcc = command(tools.nvcc, f"-ccbin={tools.cxx}", *NVCC_FLAGS, "-DUSE_CUDA", *common)
    depfile = "-MD -MF $out.d -c $in -o $out"
    reports, every_object = [], []
    with open(folder / "build.ninja", "w") as stream:
        ninja = ninja_syntax.Writer(stream, width=10**6)
        ninja.variable("ninja_required_version", "1.8")
        ninja.rule(
            "cxx",
            f"{command(tools.cxx, *CXX_FLAGS)} $flags {command(*common)} {depfile}",
            depfile="$out.d",
            deps="gcc",
            description="g++ $name",
        )
        # The report is kept for check_ptxas_report; warnings and errors remain on the screen.
        ninja.rule(
            "cuda",
            f"{nvcc} $flags {depfile} > $out.log 2>&1; status=$$?; "
            "grep -Ev '^ptxas info|bytes stack frame' $out.log; exit $$status",
            depfile="$out.d",
            deps="gcc",
            description="nvcc $name",
        )
        link_flags = command(f"-L{tools.torch / 'lib'}", *LINK_FLAGS)
        ninja.rule("link", f"{tools.cxx} -o $out $in {link_flags} $libs", description="link $name")
        for extension in extensions:
            cuda = extension.endswith("cuda")
            objects = []
            for name, sources in units(extension).items():
                target = folder / f"{name}.o"
                source = write_unit(folder / name, sources)
                if source.suffix == ".cu":
                    rule, variables = "cuda", {"flags": command(*cuda_flags(source))}
                    reports.append(Path(f"{target}.log"))
                else:
                    flags = ["-DUSE_CUDA"] if cuda else cpu_flags(source)
                    rule, variables = "cxx", {"flags": command(*flags)}
                ninja.build(str(target), rule, str(source), variables={**variables, "name": name})
                objects.append(str(target))
            every_object += objects
            library = library_name(extension)
            libs = command(*tools.cudart()) if cuda else ""
            ninja.build(library, "link", objects, variables={"libs": libs, "name": library})
            tiles = {str(path) for path in folder.glob("csrc/instantiations/*/*.o")}
            for stale in tiles - set(objects) if cuda else ():
                Path(stale).unlink()  # csrc/CMakeLists.txt links all that lies there
        ninja.build("objects", "phony", every_object)
        ninja.build("libraries", "phony", [library_name(extension) for extension in extensions])
    return reports


def library_name(extension: str) -> str:
    """One name for every Python: `_C_host.so`, not `_C_host.cpython-311-x86_64-linux-gnu.so`."""
    return extension.rpartition(".")[2] + ".so"


def run_ninja(folder: Path, target: str, *options: str) -> None:
    jobs = str(len(os.sched_getaffinity(0)))
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs, "-k0", *options]
    if subprocess.run([*ninja, target], check=False).returncode:
        raise BuildError("the build failed: the compiler's messages are above")


def build_dir(tools: Toolchain) -> Path:
    """One folder per toolchain: two environments must not rebuild each other's objects."""
    key = hashlib.sha256(repr(tools).encode()).hexdigest()[:12]
    return ROOT / "build" / f"ninja-{key}"


def build_libraries(extensions: list[str]) -> dict[str, Path]:
    """Compiles what has changed; returns the path of each library below build/."""
    tools = Toolchain.find()
    folder = build_dir(tools)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja itself does not keep two builds apart
        reports = write_build_file(tools, folder, extensions)
        run_ninja(folder, "objects")
        problems = [
            f"  {report.relative_to(folder)}: {problem}"
            for report in reports
            for problem in check_ptxas_report(report.read_text())
        ]
        if problems:
            raise BuildError(demangle("ptxas reports slow code:\n" + "\n".join(problems)))
        run_ninja(folder, "libraries", "--quiet")
    return {extension: folder / library_name(extension) for extension in extensions}


class BuildWithNinja(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], library_name(fullname)))

    def build_extensions(self) -> None:
        built = build_libraries([extension.name for extension in self.extensions])
        for name, library in built.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[]) for name in SOURCES],
        cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": AnyPythonWheel},
    )
