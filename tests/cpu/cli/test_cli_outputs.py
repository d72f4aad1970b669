"""What the command writes, where to, and what it leaves behind when it is ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import (  # noqa: F401
    CALIBRATE,
    EVAL,
    QUANTIZE,
    error_of,
    folder_fixture,
    nothing,
    original_fixture,
    run,
)
from folders import content, full_disk
from fresh_process import PACKAGE_ROOT, run_python

from liquidgemm.cli import quantize as cli_quantize


def test_an_interrupt_ends_with_130_and_leaves_nothing(folder, monkeypatch):
    """CHECKLIST 26, 28."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    there = content(folder)
    monkeypatch.setattr(cli_quantize, "save_quantized", interrupt)
    assert error_of(run(*QUANTIZE), 130) == "liquidgemm: error: interrupted"
    assert content(folder) == there
    assert not list(folder.glob(".saving-*"))


WAITING = """
import sys, time
from liquidgemm.cli import main, quantize

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)

quantize.quantize_ = wait
sys.argv = ["liquidgemm", "quantize", "model", "-o", "out"]
main.app()
"""


def test_a_terminated_run_leaves_nothing(folder):
    """CHECKLIST 26: as batch systems and containers end a process."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    assert list(folder.glob(".saving-*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(folder.glob(".saving-*"))
    assert not (folder / "out").exists()


WAITING_FOR_SIGHUP = """
import signal, sys, time
from liquidgemm.cli import main, quantize

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(5 if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else 60)
    sys.exit(7)

quantize.quantize_ = wait
if "ignore" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = ["liquidgemm", "quantize", "model", "-o", "out"]
main.app()
"""


@pytest.mark.parametrize(("how", "code"), [("default", 129), ("ignore", 7)])
def test_a_closed_terminal_leaves_nothing(folder, how, code):
    """CHECKLIST 26: and under nohup it ends nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_FOR_SIGHUP, how],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
        text=True,
    )
    assert process.stdout.readline() == "waiting\n"
    assert list(folder.glob(".saving-*"))
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == code
    assert not list(folder.glob(".saving-*"))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", [QUANTIZE, ["info", "--no-measure"]])
def test_nobody_reads_stdout(folder, monkeypatch, command):
    """CHECKLIST 28: exit code 1 without a word, and what was computed is not lost."""

    def broken(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("rich.console.Console.print", broken)
    result = run(*command)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "liquidgemm: error" not in result.stderr
    if command is QUANTIZE:
        assert (folder / "out/model.safetensors").exists()


def test_a_full_disk(folder):
    """CHECKLIST 26, 28."""
    with full_disk():
        line = error_of(run(*QUANTIZE))
    assert "model.safetensors: File too large" in line
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "empty.txt", "latin.txt",
                                                              "model"]  # fmt: skip


# Where to write.


def link(folder: Path) -> None:
    (folder / "link").symlink_to("model")


def with_a_gguf_file(folder: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models/m.gguf").write_bytes(b"GGUF")


def another_model(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other/model.safetensors").write_bytes(b"mine")


def in_the_cache(folder: Path) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = str(folder / "cache")


@pytest.mark.parametrize(
    ("prepare", "source", "output", "message"),
    [
        (nothing, "model", "model", "expected a new or empty folder, got one with content"),
        (nothing, "model", "./model/../model/", "expected a new or empty folder, got one with c"),
        (nothing, "model", ".", "expected a new or empty folder, got one with content"),
        (nothing, "model", "model/out", "expected a folder outside of "),
        (link, "model", "link", "expected a new or empty folder, got one with content"),
        (link, "link", "model", "expected a new or empty folder, got one with content"),
        (link, "link", "model/out", "expected a folder outside of "),
        (link, "model", "link/out", "expected a folder outside of "),
        (another_model, "model", "other", "expected a new or empty folder, got one with content"),
        (nothing, "model", "a.txt", "expected a new or empty folder, got a file"),
        (with_a_gguf_file, "models/m.gguf", "models", "expected a new or empty folder, got one"),
        (with_a_gguf_file, "models/m.gguf", "models/m.gguf", "folder, got a file"),
        (in_the_cache, "a/b", "cache/models--a--b/snapshots/c", "expected a folder outside of "),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_no_output_takes_the_place_of_anything(
    folder, monkeypatch, prepare, source, output, message, dry
):
    """CHECKLIST 26: refused before anything is computed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE)
    prepare(folder)
    there = content(folder)
    monkeypatch.setattr(cli_quantize, "load_model", lambda *_: pytest.fail("too late"))
    line = error_of(run("quantize", source, "-o", output, *["--dry-run"] * dry))
    assert message in line
    assert "choose another" in line
    assert content(folder) == there


def test_quantizing_beside_a_source_and_from_its_result(folder):
    """The usual way, into an empty folder too; the result is a model like any other."""
    (folder / "out").mkdir()
    assert run(*QUANTIZE).exit_code == 0
    assert "quantization.json" in os.listdir("out")
    result = run("eval", "out", "--text", "a.txt", "--tokens", "64", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 63


def test_a_model_of_the_hub(folder):
    """By its name, from the cache, and only outside of that."""
    repository = folder / "hub/models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c" * 40)
    (repository / "snapshots").mkdir()
    (folder / "model").rename(repository / "snapshots" / ("c" * 40))
    code = "from liquidgemm.cli.main import app; app()"
    for output, exit_code in (("hub/out", 1), ("out", 0)):
        result = run_python(code, "quantize", "a/b", "-o", output,
                            HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE="1")  # fmt: skip
        assert result.returncode == exit_code, result.stderr
    assert not (folder / "hub/out").exists()
    assert (folder / "out/model.safetensors").exists()
