"""The build: where nvcc comes from, what ptxas is asked, what the wheel is called."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import setup as build
import setup_toolchain as toolchain

ROOT = Path(build.__file__).parent


# --------------------------------------------------------------------------------------------------
# The search for nvcc


def fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    """A command that answers --version as nvcc does."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with no nvcc but those that a test puts in its three places."""
    wheels = tmp_path / "site-packages/nvidia"
    wheels.mkdir(parents=True)
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    found = SimpleNamespace(submodule_search_locations=[str(wheels)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "nvidia" else None
    )
    return SimpleNamespace(
        home=tmp_path / "home/bin", path=tmp_path / "path", wheels=wheels / "cu13/bin"
    )


def test_nvcc_search_order(machine: SimpleNamespace) -> None:
    """CUDA_HOME comes before PATH, PATH before the wheels."""
    assert toolchain.find_nvcc() is None
    wheel = fake_nvcc(machine.wheels)
    assert toolchain.find_nvcc() == wheel
    on_path = fake_nvcc(machine.path)
    assert toolchain.find_nvcc() == on_path
    at_home = fake_nvcc(machine.home)
    assert toolchain.find_nvcc() == at_home


def test_old_nvcc_is_passed_over(machine: SimpleNamespace) -> None:
    """An nvcc that knows no sm_90a does not hide the newer one of the wheels."""
    fake_nvcc(machine.path, release="11.8")
    assert toolchain.find_nvcc() is None
    wheel = fake_nvcc(machine.wheels)
    assert toolchain.find_nvcc() == wheel


def test_broken_nvcc_is_passed_over(machine: SimpleNamespace) -> None:
    machine.home.mkdir(parents=True)
    broken = machine.home / "nvcc"
    broken.write_bytes(b"no program")
    broken.chmod(0o755)
    on_path = fake_nvcc(machine.path)
    assert toolchain.find_nvcc() == on_path


def test_missing_tools_are_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler is not on PATH"):
        build.Toolchain.find()
    monkeypatch.setenv("CXX", str(fake_nvcc(machine.path / "elsewhere")))
    with pytest.raises(build.BuildError, match=r"no nvcc 12\.4 or newer"):
        build.Toolchain.find()
    with pytest.raises(build.BuildError, match=r"pip install 'torch>=2\.10'"):
        toolchain.torch_dir()
    with pytest.raises(build.BuildError, match="nvidia-cutlass"):
        toolchain.cutlass_include()


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for file in ("csrc/torch/cuda/gemm.cpp", "csrc/liquidgemm/host/plan.cpp"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    with pytest.raises(
        build.BuildError, match=r"no file matches csrc/liquidgemm/\*/\*\.cu, csrc/inst"
    ):
        build.source_files("liquidgemm._C_cuda")


@pytest.mark.parametrize("extension", build.SOURCES)
def test_units_have_every_source_once(extension: str) -> None:
    units = build.units(extension)
    together = [source for sources in units.values() for source in sources]
    assert sorted(together) == sorted(build.source_files(extension))
    for name, sources in units.items():
        assert {source.parent for source in sources} == {ROOT / Path(name).parent}
        assert len(sources) == 1 or "csrc/instantiations/" in name


def test_the_file_of_a_unit(tmp_path: Path) -> None:
    """It includes the sources, and is only written if they are others: ninja looks at its time."""
    sources = [tmp_path / name for name in ("one.cu", "two.cu", "three.cu")]
    for number, source in enumerate(sources):
        source.write_text(f"int of_{number};")
    unit = tmp_path / "units/unit.cu"
    assert build.write_unit(unit, sources[:1]) == sources[0]
    assert not unit.exists()
    assert build.write_unit(unit, sources[:2]) == unit
    compiled = build.run_quietly("g++", "-E", "-P", "-x", "c++", unit)
    assert compiled.stdout.split("\n")[:2] == ["int of_0;", "int of_1;"], compiled.stderr
    os.utime(unit, (1, 1))
    build.write_unit(unit, sources[:2])
    assert unit.stat().st_mtime == 1
    build.write_unit(unit, sources)
    assert unit.stat().st_mtime > 1


# --------------------------------------------------------------------------------------------------
# The report of ptxas

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4gemmILi64EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z4gemmILi64EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers
"""


def test_clean_report_passes() -> None:
    assert build.check_ptxas_report(CLEAN) == []


@pytest.mark.parametrize("spill", ["4 bytes spill stores, 0", "0 bytes spill stores, 4"])
def test_spills_fail_and_name_the_kernel(spill: str) -> None:
    report = CLEAN + CLEAN.replace("ILi64E", "ILi256E").replace("0 bytes spill stores, 0", spill)
    assert build.check_ptxas_report(report) == [
        f"_Z4gemmILi256EEvPf spills registers: {spill} bytes spill loads"
    ]


@pytest.mark.parametrize(
    "note",
    [
        "(C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register "
        "requirements.",
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in function '_Z4gemmILi64EEvPf'",
    ],
)
def test_performance_notes_fail(note: str) -> None:
    assert build.check_ptxas_report(f"ptxas info    : {note}\n{CLEAN}") == [note]


def test_silence_fails() -> None:
    """Without -v there is nothing to check, which must not look like success."""
    assert build.check_ptxas_report("") != []


SPILLING_KERNEL = """
__global__ void __launch_bounds__(1024) reverse(float* data) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) kept[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) data[i * 1024 + threadIdx.x] = kept[127 - i];
}
"""


def test_spills_are_seen_in_what_nvcc_really_prints(tmp_path: Path) -> None:
    """1024 threads have 64 registers each: 128 live values cannot but spill."""
    source = tmp_path / "reverse.cu"
    source.write_text(SPILLING_KERNEL)
    nvcc = build.Toolchain.find().nvcc
    run = build.run_quietly(nvcc, *build.NVCC_FLAGS, "-c", source, "-o", tmp_path / "reverse.o")
    (problem,) = build.check_ptxas_report(run.stdout + run.stderr)
    assert re.match(r"\S*reverse\S* spills registers: [1-9]\d* bytes", problem)


# --------------------------------------------------------------------------------------------------
# The source distribution and the wheel

AS_PIP_RUNS_IT = """
import sys
from setuptools import build_meta
build_meta.prepare_metadata_for_build_wheel(sys.argv[1])
assert "setup_toolchain" in sys.modules
"""


def test_the_source_distribution_has_what_builds_it(tmp_path: Path) -> None:
    """Also the module beside setup.py, whose folder pip does not put on the path."""

    def python(folder: Path, *words: str | Path) -> None:
        command = [sys.executable, *words]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr

    # The list is what an sdist would hold, which itself would be put together in the checkout.
    python(ROOT, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path)
    listed = (tmp_path / "liquidgemm.egg-info/SOURCES.txt").read_text().splitlines()
    unpacked = tmp_path / "unpacked"
    for name in listed:
        if os.path.isabs(name):
            continue  # the list itself and its neighbours
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, unpacked / name)
    for extension in build.SOURCES:
        for source in build.source_files(extension):
            assert (unpacked / source.relative_to(ROOT)).exists()
    python(unpacked, "-I", "-c", AS_PIP_RUNS_IT, tmp_path)


def test_names_fit_every_python() -> None:
    """Neither the wheel's tag nor the names of the libraries say which Python built them."""
    from setuptools import Distribution, Extension

    package = Distribution(
        {
            "name": "liquidgemm",
            "ext_modules": [Extension(name, sources=[]) for name in build.SOURCES],
        }
    )
    wheel = build.AnyPythonWheel(package)
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform == f"linux_{os.uname().machine}"
    command = build.BuildWithNinja(package)
    assert [command.get_ext_filename(name) for name in build.SOURCES] == [
        "liquidgemm/_C_host.so",
        "liquidgemm/_C_cuda.so",
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_pins_agree() -> None:
    """What an isolated build installs is what the development environment has."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    isolated = set(project["build-system"]["requires"])
    assert {*groups["cutlass"], *groups["nvcc"]} <= isolated
    assert {pin for pin in groups["dev"] if re.match("torch|setuptools|ninja", pin)} <= isolated
    assert project["project"]["optional-dependencies"]["demo"] == groups["demo"]
