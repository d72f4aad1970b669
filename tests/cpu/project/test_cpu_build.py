"""The CPU kernels outside torch: under sanitizers, for Arm, and what their objects may export."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import liquidgemm
import setup as build

ROOT = Path(build.__file__).parent
KERNELS = ROOT / "csrc/liquidgemm/cpu"
PROGRAM = ROOT / "tests/cpp/cpu/test_kernels.cpp"


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OK = re.compile(r"^(\w+): ok$", re.MULTILINE)


def compile_one(source: Path, target: Path, cxx: str, machine: str, *flags: str) -> Path:
    """A source of the program or the kernels, with the flags that it is built with."""
    own = (*build.CPU_CXX_FLAGS, *build.CPU_FLAGS_OF[machine].get(source.stem, ()))
    (standard,) = (flag for flag in build.CXX_FLAGS if flag.startswith("-std="))
    command = [cxx, standard, "-O1", "-g1", "-Wall", "-Wextra", *own, *flags]
    includes = build.Toolchain.find().includes(ROOT)
    run = build.run_quietly(*command, *includes, "-c", source, "-o", target)
    assert run.returncode == 0, run.stderr
    return target


def compile_all(folder: Path, cxx: str, machine: str, *flags: str) -> dict[str, Path]:
    """Objects of the test program and of all kernels of a machine, by name."""
    names = (*build.CPU_COMMON, *build.CPU_FLAGS_OF[machine])
    sources = [PROGRAM, *(KERNELS / f"{name}.cpp" for name in names)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = pool.map(
            lambda source: compile_one(source, folder / f"{source.stem}.o", cxx, machine, *flags),
            sources,
        )
        return {path.stem: path for path in objects}


def link(objects: dict[str, Path], program: Path, cxx: str, *flags: str) -> Path:
    linked = build.run_quietly(cxx, *flags, *objects.values(), "-o", program)
    assert linked.returncode == 0, linked.stderr
    return program


def run_program(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """With sanitizers, for this machine."""
    machine = os.uname().machine
    if machine not in build.CPU_FLAGS_OF:
        pytest.skip(f"no kernels for {machine} other than portable ones")
    folder = tmp_path_factory.mktemp("sanitized")
    return compile_all(folder, build.Toolchain.find().cxx, machine, *SANITIZERS)


def test_kernels_under_sanitizers(objects: dict[str, Path], tmp_path: Path) -> None:
    """CHECKLIST 29: no access outside of what was given, no undefined arithmetic."""
    cxx = build.Toolchain.find().cxx
    run = run_program(link(objects, tmp_path / "kernels", cxx, *SANITIZERS))
    assert run.returncode == 0, run.stdout + run.stderr
    assert OK.findall(run.stdout) == list(liquidgemm.cpu_kernels()[:-1])


# Bugs planted into the set that every machine has: what is replaced, by what, and what is said.
PLANTED = {
    "offsets of the upper rows": ("+ uint32_t(params[4 * g + 3] * sum)", "", "FAILED: sum"),
    "steps of the upper rows": (
        "{{params[0], params[2]}}",
        "{{params[0], params[0]}}",
        "FAILED: sum",
    ),
    "past the activations": ("x + kChunk * nibble + 2 * i", "x + 2 * kChunk * nibble + 2 * i", ""),
    "past the weights": ("chunk + 2 * i, 2)", "chunk + 4 * i, 2)", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(objects: dict[str, Path], tmp_path: Path, bug: str) -> None:
    """The checks of the program notice wrong sums, and the sanitizers reads out of bounds."""
    old, new, message = PLANTED[bug]
    text = (KERNELS / "portable.cpp").read_text()
    assert text.count(old) == 1, f"{bug}: portable.cpp no longer holds {old!r} once"
    source = tmp_path / "portable.cpp"
    source.write_text(text.replace(old, new))
    tools, machine = build.Toolchain.find(), os.uname().machine
    compiled = compile_one(source, tmp_path / "portable.o", tools.cxx, machine, *SANITIZERS)
    program = link(objects | {"portable": compiled}, tmp_path / "bug", tools.cxx, *SANITIZERS)
    run = run_program(program)
    assert run.returncode != 0
    assert message in run.stdout


def test_sanitizers_see_an_overrun(tmp_path: Path) -> None:
    """The check of the check: a program that reads one byte too many fails."""
    source = tmp_path / "overrun.cpp"
    source.write_text("int main(int n, char**) { char* p = new char[4]; return p[n + 3]; }")
    program = tmp_path / "overrun"
    tools = build.Toolchain.find()
    built = build.run_quietly(tools.cxx, "-fsanitize=address", source, "-o", program)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert "heap-buffer-overflow" in run.stderr


CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no {CROSS} to compile for Arm")
def test_kernels_of_arm(tmp_path: Path) -> None:
    """Compiles for aarch64 and, where there is an emulator, runs all sets."""
    objects = compile_all(tmp_path, CROSS, "aarch64")
    program = link(objects, tmp_path / "kernels", CROSS, "-static")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but no {EMULATOR} to run it")
    run = run_program(EMULATOR, "-cpu", "max", program)
    assert run.returncode == 0, run.stdout + run.stderr
    assert OK.findall(run.stdout) == ["neon_i8mm", "neon_dotprod", "portable"]


def test_objects_of_an_instruction_set_share_nothing(tmp_path: Path) -> None:
    """A function that several files define is merged by the linker, into one that may use
    instructions which the processor lacks: each file may define its table alone."""
    tools = build.Toolchain.find()
    for name, flags in build.CPU_FLAGS.items():
        target = tmp_path / f"{name}.o"
        command = [tools.cxx, *build.CXX_FLAGS, *build.CPU_CXX_FLAGS, *flags, *tools.includes(ROOT)]
        run = build.run_quietly(*command, "-c", KERNELS / f"{name}.cpp", "-o", target)
        assert run.returncode == 0, run.stderr
        symbols = build.run_quietly("nm", "--demangle", "--defined-only", "--extern-only", target)
        defined = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
        assert defined == [f"liquidgemm::cpu::{name}_kernels()"]
