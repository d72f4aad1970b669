"""The wrong machine: what loading, status() and the ops say where the kernel cannot run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liquidgemm
from liquidgemm.ops import _library

ROOT = Path(liquidgemm.__file__).parent.parent


def test_the_cuda_library_is_loaded_wherever_torch_has_cuda():
    """CHECKLIST 20: a broken build is a failure, not a skip."""
    if torch.version.cuda is None:
        assert "without CUDA" in _library.load_libraries()
    else:
        assert _library.load_libraries() is None


def test_status_of_this_machine():
    """CHECKLIST 20."""
    status = _library.status()
    assert status.host_library.exists()
    assert status.cuda_available == bool(_library.hopper_devices())
    assert status.reason.startswith("The Hopper kernel ")
    assert status.reason.endswith(".")
    assert (status.cuda_library is None) == (torch.version.cuda is None)


@pytest.fixture
def pretend(monkeypatch):
    """Makes status() see a CUDA build of torch, with the library loaded and the given GPUs."""

    def set_up(gpus, init_error=None, library_problem=None):
        def init():
            raise RuntimeError(init_error)

        monkeypatch.setattr(_library, "load_libraries", lambda: library_problem)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i][1])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i][0])
        monkeypatch.setattr(torch.cuda, "init", init if init_error else lambda: None)
        return _library.status()

    return set_up


def test_status_on_hopper(pretend):
    status = pretend([("A100", (8, 0)), ("H100", (9, 0))])
    assert status.cuda_available
    assert status.reason == "The Hopper kernel runs on cuda:1 (H100, compute capability 9.0)."


@pytest.mark.parametrize(("name", "capability"), [("A100", (8, 0)), ("B200", (10, 0))])
def test_status_on_other_gpus(pretend, name, capability):
    """CHECKLIST 20: A100 and Blackwell."""
    status = pretend([(name, capability)])
    assert not status.cuda_available
    assert status.cuda_library == _library.CUDA_LIBRARY
    number = ".".join(map(str, capability))
    assert f"needs compute capability 9.0, and cuda:0 ({name}) has" in status.reason
    assert status.reason.endswith(f"capability {number}.")


@pytest.mark.parametrize(
    "message",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "The NVIDIA driver on your system is too old (found version 12020). Please update",
    ],
)
def test_status_without_a_usable_driver(pretend, message):
    """CHECKLIST 20: torch's own first sentence."""
    status = pretend([], init_error=message)
    assert status.reason == f"The Hopper kernel cannot run here: {message.split('. ')[0]}."


def test_status_without_devices(pretend):
    assert "no CUDA device" in pretend([]).reason


def test_status_without_the_cuda_library(pretend):
    status = pretend([("H100", (9, 0))], library_problem="_C_cuda.so has not been built")
    assert not status.cuda_available
    assert status.cuda_library is None
    assert "_C_cuda.so has not been built" in status.reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="the CUDA library is loaded")
@pytest.mark.parametrize("op", ["gemm", "linear", "quantize_activation", "pack_weight"])
def test_cuda_tensors_without_the_cuda_library(op):
    """CHECKLIST 20: what a CUDA tensor would reach says why there is no kernel."""
    overload = getattr(torch.ops.liquidgemm, op).default
    tensors = [torch.zeros(1)] * sum(
        a.type.kind() == "TensorType" for a in overload._schema.arguments
    )
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        RuntimeError, match=rf"liquidgemm.{op}: the CUDA implementation is not load"
    ):
        overload.redispatch(key, *tensors)


IMPORT_WITH = """
from pathlib import Path
import sys
{setup}
try:
    import liquidgemm
except ImportError as error:
    print("ImportError", error)
else:
    from liquidgemm.ops import _library
    import torch
    y = liquidgemm.LiquidLinear(64, 8)(torch.ones(2, 64))
    print("imported", y.shape, _library.status().reason)
"""


def import_with(tmp_path, setup):
    """Imports a copy of the package without libraries; setup sees `package`, its folder."""
    package = tmp_path / "liquidgemm"
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "liquidgemm", package, ignore=without)
    setup = f"package = Path({str(package)!r})\nbuilt = Path({str(ROOT / 'liquidgemm')!r})\n{setup}"
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH.format(setup=setup)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


USE_HOST = "(package / '_C_host.so').symlink_to(built / '_C_host.so')\n"
PRETEND_CUDA = "import torch; torch.version.cuda = '13.0'\n"


def test_import_without_the_host_library(tmp_path):
    """CHECKLIST 20: says how to build it."""
    output = import_with(tmp_path, "")
    assert output.startswith("ImportError liquidgemm: ")
    assert "_C_host.so has not been built" in output
    assert "setup.py build_ext --inplace" in output


def test_import_with_a_broken_host_library(tmp_path):
    output = import_with(tmp_path, "(package / '_C_host.so').write_bytes(b'not a library')")
    assert output.startswith("ImportError liquidgemm: ")
    assert "does not load" in output


def test_import_with_a_host_library_of_an_older_version(tmp_path):
    """One that loads, without the ops of the CPU: it must be built anew."""
    compiler = "import subprocess; target = str(package / '_C_host.so'); subprocess.run("
    compiler += "['g++', '-shared', '-x', 'c++', '/dev/null', '-o', target], check=True)"
    output = import_with(tmp_path, compiler)
    assert output.startswith("ImportError liquidgemm: ")
    assert "_C_host.so is of an older version" in output
    assert "setup.py build_ext --inplace" in output


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_import_on_a_torch_without_cuda_leaves_the_cuda_library_alone(tmp_path):
    """CHECKLIST 20: even a file that cannot be loaded does no harm."""
    setup = USE_HOST + "(package / '_C_cuda.so').write_bytes(b'not a library')"
    output = import_with(tmp_path, setup)
    assert output.startswith("imported torch.Size([2, 8])")
    assert "without CUDA" in output


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (PRETEND_CUDA, "_C_cuda.so has not been built"),
        (
            PRETEND_CUDA + "(package / '_C_cuda.so').write_bytes(b'not a library')",
            "_C_cuda.so does not load",
        ),
    ],
    ids=["missing", "broken"],
)
def test_import_with_cuda_but_no_usable_cuda_library(tmp_path, setup, reason):
    """CHECKLIST 20: the CPU path works, and the reason is told."""
    output = import_with(tmp_path, USE_HOST + setup)
    assert output.startswith("imported torch.Size([2, 8])")
    assert reason in output
