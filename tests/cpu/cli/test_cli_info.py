"""``liquidgemm info``: for people, and as JSON whose keys scripts may rely on."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import liquidgemm
from liquidgemm.cli import info as cli_info
from liquidgemm.cli import main as cli
from liquidgemm.ops import _library
from liquidgemm.ops.plans import plan_names


def info(*options: str) -> str:
    result = CliRunner().invoke(cli.app, ["info", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")


def test_what_is_installed_and_what_runs() -> None:
    text = info("--no-measure")
    assert liquidgemm.__version__ in text
    assert torch.__version__ in text
    assert str(_library.HOST_LIBRARY) in text
    assert _library.status().reason in text
    assert f"CPU kernel {liquidgemm.cpu_kernel()}, exact to the same bits" in text
    assert "µs" not in text


def test_plans_are_behind_a_flag() -> None:
    names = plan_names()
    assert not any(name in info("--no-measure") for name in names)
    assert all(name in info("--no-measure", "--plans") for name in names)
    assert json.loads(info("--no-measure", "--json", "--plans"))["plans"] == list(names)


def test_json_has_the_keys_that_scripts_rely_on() -> None:
    """Only what is added may change this test."""
    found = json.loads(info("--json"))
    assert found.keys() == {
        "liquidgemm",
        "python",
        "platform",
        "torch",
        "torch_cuda",
        "packages",
        "gpus",
        "path",
        "kernel",
        "cpu",
        "host_library",
        "cuda_library",
        "speed",
        "plans",
    }
    assert found["packages"].keys() == set(cli_info.PACKAGES)
    assert found["kernel"].keys() == {"available", "reason"}
    assert found["kernel"]["available"] == (found["path"] == "kernel")
    assert found["cpu"].keys() == {"threads", "kernel", "kernels"}
    assert found["cpu"]["kernel"] in found["cpu"]["kernels"]
    assert found["torch_cuda"] == torch.version.cuda
    assert found["plans"] is None
    assert [case["tokens"] for case in found["speed"]] == [1, 16]
    for case in found["speed"]:
        assert case.keys() == {
            "tokens",
            "out_features",
            "in_features",
            "liquidgemm_us",
            "torch_us",
            "torch_dtype",
        }
        assert math.isfinite(case["liquidgemm_us"])
        assert case["liquidgemm_us"] > 0 < case["torch_us"]


def test_the_measurement_is_for_people_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_info, "SIZE", 256)
    text = info()
    assert text.count("µs for a layer of 256 x 256; torch in ") == 2


@pytest.mark.parametrize(
    "reason",
    [
        "torch 2.13.0+cpu is a build without CUDA",
        "_C_cuda.so has not been built",
        "it needs compute capability 9.0, and cuda:0 (A100) has compute capability 8.0",
        "The NVIDIA driver on your system is too old (found version 12020)",
        "Found no NVIDIA driver on your system",
    ],
)
def test_why_not_the_kernel(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Whatever `_library.status` finds is what is said; test_library.py has that it finds it."""
    status = _library.LibraryStatus(_library.HOST_LIBRARY, None, False, reason)
    monkeypatch.setattr(_library, "status", lambda: status)
    assert reason in info("--no-measure")
    found = json.loads(info("--no-measure", "--json"))
    assert (found["path"], found["kernel"]["reason"]) == ("cpu", reason)


def test_gpus_are_listed_and_their_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(
        name="[red]A100", major=8, minor=0, multi_processor_count=108, total_memory=80 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    (found,) = cli_info.gpus()
    assert found == {
        "index": 0,
        "name": "[red]A100",
        "compute_capability": "8.0",
        "sms": 108,
        "memory_bytes": 80 * 2**30,
    }
    monkeypatch.setattr(cli_info, "gpus", lambda: [found])
    assert "cuda:0 [red]A100, compute capability 8.0, 108 SMs, 80 GiB" in info("--no-measure")


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_info, "PACKAGES", ("torch", "no-such-package"))
    assert "not installed  no-such-package" in info("--no-measure")
    assert json.loads(info("--no-measure", "--json"))["packages"]["no-such-package"] is None
