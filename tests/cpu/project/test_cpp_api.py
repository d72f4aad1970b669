"""The C++ library as a target of CMake: another project is configured, built and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import setup as build
from liquidgemm.ops import _library
from liquidgemm.ops.plans import explain_plan

HEADERS = sorted((ROOT / "csrc/liquidgemm").glob("*.hpp"))


def run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def library_sources() -> list[Path]:
    """Of the target: what setup.py compiles for CUDA, without the torch ops."""
    files = build.source_files("liquidgemm._C_cuda")
    return [file for file in files if not file.is_relative_to(ROOT / "csrc/torch")]


@pytest.fixture(scope="module")
def tools() -> build.Toolchain:
    return build.Toolchain.find()


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.stem)
def test_public_headers_stand_alone(header: Path, tools: build.Toolchain, tmp_path: Path) -> None:
    """Each compiles by itself, with CUDA's headers and without those of CUTLASS and torch."""
    cuda = tools.cuda_file("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h").parent
    source = tmp_path / "header.cpp"
    source.write_text(f'#include "liquidgemm/{header.name}"\n')
    run(
        *(tools.cxx, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"),
        *(f"-I{ROOT / 'csrc'}", "-isystem", cuda, source),
    )


@pytest.fixture(scope="module")
def cmake() -> str:
    path = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path, "cmake is missing: pip install cmake"
    return path


@pytest.mark.parametrize("project", ["examples/cpp", "bench/cpp"])
def test_the_target_compiles_every_source(
    project: str, cmake: str, tools: build.Toolchain, tmp_path: Path
) -> None:
    """Configured without ready objects: all sources below torch, as C++20, for Hopper."""
    run(
        *(cmake, "-S", ROOT / project, "-B", tmp_path, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        *(f"-DCMAKE_CXX_COMPILER={tools.cxx}", f"-DCUDAToolkit_ROOT={tools.cuda}"),
        *(f"-DCMAKE_CUDA_COMPILER={tools.nvcc}", f"-DCUTLASS_INCLUDE={tools.cutlass}"),
    )
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = {Path(command["file"]): command["command"] for command in commands}
    for source in library_sources():
        assert re.findall(r"-std=(\S+)", compiled[source])[-1] in ("c++20", "gnu++20"), source
        assert "-DNDEBUG" in compiled[source]
        if source.suffix == ".cu":
            assert "sm_90a" in compiled[source]
            assert "-DCUTLASS_ENABLE_GDC_FOR_SM90" in compiled[source]


@pytest.fixture(scope="module")
def objects(tools: build.Toolchain) -> list[Path]:
    """What the build of this checkout has compiled of the target."""
    names = build.units("liquidgemm._C_cuda")
    files = [build.build_dir(tools) / f"{name}.o" for name in names if "csrc/torch/" not in name]
    if missing := [file for file in files if not file.exists()]:
        pytest.skip(
            f"{len(missing)} objects such as {missing[0].name} are not compiled: "
            "run `python setup.py build_ext --inplace`"
        )
    return files


def test_what_the_api_refuses(objects: list[Path], tools: build.Toolchain, tmp_path: Path) -> None:
    """A plan that is not for these arguments is an error, not a launch."""
    program = tmp_path / "contracts"
    run(
        *(tools.cxx, "-std=c++20", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", "-isystem"),
        *(tools.cuda_file("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h").parent,),
        *(ROOT / "tests/cpp_api/contracts.cpp", *objects, *tools.cudart(), "-o", program),
    )
    assert run(program).endswith("contracts: ok\n")


def test_another_project_links_the_library(
    cmake: str, objects: list[Path], tools: build.Toolchain, tmp_path: Path
) -> None:
    """examples/cpp, with the objects that the build of this checkout has left."""
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    run(
        *(cmake, "-S", ROOT / "examples/cpp", "-B", tmp_path, *generator),
        *(f"-DCMAKE_CXX_COMPILER={tools.cxx}", f"-DCUDAToolkit_ROOT={tools.cuda}"),
        f"-DLIQUIDGEMM_OBJECTS={build.build_dir(tools) / 'csrc'}",
    )
    run(cmake, "--build", tmp_path)
    program = subprocess.run(
        [tmp_path / "linear"], capture_output=True, text=True, timeout=60, check=False
    )
    plan = re.search(r"plan (\w+), behind a quantizer", program.stdout)
    assert plan, program.stdout + program.stderr
    if _library.hopper_devices():
        assert program.returncode == 0, program.stdout
        assert "results are exact" in program.stdout
    else:
        assert program.returncode == 2, program.stdout
        assert plan[1] == explain_plan(64, 1024, 2048, op="linear").plan
        assert "nothing was run" in program.stdout
    # int8 rows and a float for each.
    assert f"workspace: {64 * (2048 + 4)} bytes" in program.stdout
