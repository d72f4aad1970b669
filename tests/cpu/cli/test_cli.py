"""The command line: help, exit codes, readable errors, and the demonstration on a tiny model."""

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.status import Status
from typer.testing import CliRunner

import liquidgemm
from liquidgemm.cli import demo
from liquidgemm.cli import main as cli
from liquidgemm.ops import _library

runner = CliRunner()


def is_installed() -> bool:
    return any(importlib.metadata.entry_points(group="console_scripts", name="liquidgemm"))


installed = pytest.mark.skipif(
    not is_installed(), reason="liquidgemm is not installed, only imported from its source"
)


def error_line(result) -> str:
    """The one line that a failing command leaves on stderr."""
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("liquidgemm: error: ")
    return line


# --------------------------------------------------------------------------------------------------
# Commands, help and exit codes


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@installed
def test_installed_command() -> None:
    """The entry point of the installed package is the app."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="liquidgemm")
    assert entry.load() is cli.app


def test_version() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"liquidgemm {liquidgemm.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["info", "--no-such-option"],
        ["demo", "--tokens", "1"],
        ["demo", "--device", "tpu"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert arguments[-1].strip("-") in result.stderr


def test_demo_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "The Hopper kernel cannot run: this is a test."
    status = _library.LibraryStatus(_library.HOST_LIBRARY, None, False, why)
    monkeypatch.setattr(_library, "status", lambda: status)
    assert why in error_line(runner.invoke(cli.app, ["demo", "--device", "cuda"]))


# --------------------------------------------------------------------------------------------------
# The model file


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGES", ())  # fetching the model needs none of them
    return tmp_path / "liquidgemm"


def pretend_download(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
    """Replaces the download by a file of this content; returns the folders it is asked for."""
    folders = []

    def download(folder: Path) -> Path:
        folders.append(folder)
        (folder / "model").write_bytes(content)
        return folder / "model"

    monkeypatch.setattr(demo, "download_model", download)
    return folders


def expect_model(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Makes this content the one that the pinned hash stands for."""
    monkeypatch.setattr(demo, "MODEL_BYTES", len(content))
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(content).hexdigest())


def test_demo_without_network(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    line = error_line(runner.invoke(cli.app, ["demo", "--device", "cpu"]))
    assert demo.MODEL_REQUIREMENT in line
    assert "needs the network" in line
    assert list(empty_cache.iterdir()) == []


def test_wrong_hash_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_download(monkeypatch, b"something else")
    line = error_line(runner.invoke(cli.app, ["demo", "--device", "cpu"]))
    assert hashlib.sha256(b"something else").hexdigest() in line
    assert demo.MODEL_SHA256 in line
    assert list(empty_cache.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(demo, "PACKAGES", ())
    line = error_line(runner.invoke(cli.app, ["demo", "--device", "cpu"]))
    assert "cannot store the model" in line


def test_model_is_fetched_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good file is used again; one that was damaged since is fetched anew."""
    expect_model(monkeypatch, b"the model")
    folders = pretend_download(monkeypatch, b"the model")
    file = demo.fetch_model()
    assert file.parent == empty_cache
    assert demo.fetch_model() == file
    assert len(folders) == 1
    file.write_bytes(b"the modem")
    assert demo.fetch_model() == file
    assert file.read_bytes() == b"the model"
    assert len(folders) == 2


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGES", ("torch", "no_such_package"))
    line = error_line(runner.invoke(cli.app, ["demo", "--device", "cpu"]))
    assert "needs no_such_package: pip install no_such_package" in line


# --------------------------------------------------------------------------------------------------
# The demonstration


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a random two-layer model and a tokenizer of single bytes in SmolLM2's place."""
    transformers = pytest.importorskip("transformers", reason="the extra 'demo' is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<eos>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    bytes_tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_tokenizer.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer,
        eos_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=demo.WINDOW,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(demo, "fetch_model", Path)
    monkeypatch.setattr(demo, "load_model", lambda file, device, dtype: (model, tokenizer))
    monkeypatch.setattr(demo, "evaluation_text", lambda: "a few words of text. " * 60)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 4)


@pytest.mark.usefixtures("tiny_model")
def test_demonstration_on_a_tiny_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Status, "update", lambda status, text: shown.append(text))
    console = Console(width=120, file=None)
    demo.run(console, torch.device("cpu"), 2 * demo.WINDOW, "Why?")
    assert shown == [
        f"generating an answer {when}: {count} of 4 tokens"
        for when in ("before", "after")
        for count in range(5)
    ]
    printed = capsys.readouterr().out
    assert "the CPU, by its" in printed
    assert "perplexity" in printed
    assert "1024 tokens" in printed
    assert "4-bit itself" in printed
    assert printed.count("before") >= 2
    assert "14 linear layers quantized" in printed
    assert "Question: Why?" in printed


@installed
def test_package_is_runnable_from_anywhere(tmp_path: Path) -> None:
    """The command finds its libraries whatever the working directory."""
    command = [
        sys.executable,
        "-c",
        "from liquidgemm.cli import app; app()",
        "info",
        "--no-measure",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Hopper kernel" in run.stdout
