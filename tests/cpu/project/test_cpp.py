"""Runs the C++ host tests: every tests/cpp/*.cpp is a program that returns nonzero on failure."""

import subprocess
from pathlib import Path

import pytest
from repository import TESTS

import setup as build

PROGRAMS = sorted((TESTS / "cpp").glob("*.cpp"))


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda source: source.stem)
def test_host_program(source: Path, tmp_path: Path) -> None:
    """CHECKLIST 4: the program compiles without nvcc and succeeds; test_decode.cpp asks the
    kernel's own function for every step, offset and code."""
    tools = build.Toolchain.find()
    program = tmp_path / source.stem
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += tools.includes(build.ROOT)
    compiled = subprocess.run(
        [tools.cxx, *flags, str(source), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_there_are_programs() -> None:
    """A renamed folder must not pass as zero tests."""
    assert PROGRAMS
