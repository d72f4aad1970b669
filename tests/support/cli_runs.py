"""The command on a tiny model, in a working directory of its own."""

import subprocess
from pathlib import Path

import pytest
import tiny_llama
from typer.testing import CliRunner

from liquidgemm.cli import main as cli


@pytest.fixture(scope="session", name="original")
def original_fixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama.with_tokenizer(tiny_llama.float_model(folder))


@pytest.fixture(name="folder")
def folder_fixture(original, tmp_path, monkeypatch) -> Path:
    """The working directory: a model, texts, and what a case adds to them."""
    here = tmp_path / "here"
    here.mkdir()
    subprocess.run(["cp", "-r", original, here / "model"], check=True)
    (here / "a.txt").write_text(" ".join(f"t{i % 250}" for i in range(999)))
    (here / "empty.txt").write_text(" \n")
    (here / "latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.chdir(here)
    return here


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def error_of(result, code: int = 1) -> str:
    """The last line of stderr; there is no other that tells of the error."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    *noise, line = result.stderr.strip().splitlines()
    assert line.startswith("liquidgemm: error: ")
    assert not any("error" in other.lower() for other in noise)
    assert len(line) < 700
    return line


QUANTIZE = ["quantize", "model", "-o", "out"]
CALIBRATE = [*QUANTIZE, "--method", "gptq", "--calib"]
EVAL = ["eval", "model", "--text", "a.txt"]


def nothing(folder: Path) -> None:
    pass
