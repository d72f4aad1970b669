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


def compile_program(folder: Path, cxx: str, machine: str, *flags: str) -> Path:
    """The test program with all CPU kernels of a machine, each source with its own flags."""
    sets = build.CPU_FLAGS_OF[machine]
    sources = [PROGRAM, *(KERNELS / f"{name}.cpp" for name in (*build.CPU_COMMON, *sets))]
    includes = build.Toolchain.find().includes()

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = (*build.CPU_CXX_FLAGS, *sets.get(source.stem, ()))
        command = [cxx, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", *own, *flags, *includes]
        run = build.run_quietly(*command, "-c", source, "-o", target)
        assert run.returncode == 0, run.stderr
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "test_kernels"
    linked = build.run_quietly(cxx, *flags, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    return program


def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """CHECKLIST 29: no access outside of what was given, no undefined arithmetic."""
    machine = os.uname().machine
    if machine not in build.CPU_FLAGS_OF:
        pytest.skip(f"no kernels for {machine} other than portable ones")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compile_program(tmp_path, build.Toolchain.find().cxx, machine, *flags)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    tested = re.findall(r"^(\w+): ok$", run.stdout, re.MULTILINE)
    assert tested == list(liquidgemm.cpu_kernels()[:-1])


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
    program = compile_program(tmp_path, CROSS, "aarch64", "-static")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but no {EMULATOR} to run it")
    run = subprocess.run(
        [EMULATOR, "-cpu", "max", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^(\w+): ok$", run.stdout, re.MULTILINE) == [
        "neon_i8mm",
        "neon_dotprod",
        "portable",
    ]


def test_objects_of_an_instruction_set_share_nothing(tmp_path: Path) -> None:
    """A function that several files define is merged by the linker, into one that may use
    instructions which the processor lacks: each file may define its table alone."""
    tools = build.Toolchain.find()
    for name, flags in build.CPU_FLAGS.items():
        target = tmp_path / f"{name}.o"
        command = [tools.cxx, *build.CXX_FLAGS, *build.CPU_CXX_FLAGS, *flags, *tools.includes()]
        run = build.run_quietly(*command, "-c", KERNELS / f"{name}.cpp", "-o", target)
        assert run.returncode == 0, run.stderr
        symbols = build.run_quietly("nm", "--demangle", "--defined-only", "--extern-only", target)
        defined = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
        assert defined == [f"liquidgemm::cpu::{name}_kernels()"]
