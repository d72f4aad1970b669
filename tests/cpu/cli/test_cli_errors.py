"""Errors of the command: one line on stderr that says what is wrong, and nothing half-written."""

import json
import subprocess
from pathlib import Path

import pytest
import tiny_llama
import torch
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
from folders import content

from liquidgemm import quantize_, save_quantized
from liquidgemm.checkpoints import sources
from liquidgemm.cli import quantize as cli_quantize
from liquidgemm.ops import _library
from liquidgemm.quantization.config import GATES, HEADS, METHODS


def test_choices_are_those_of_the_config() -> None:
    assert [method.value for method in cli_quantize.Method] == list(METHODS)
    assert [gate.value for gate in cli_quantize.Gate] == list(GATES)
    assert [head.value for head in cli_quantize.Head] == list(HEADS)


def config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def remove(*names: str):
    def edit(folder: Path) -> None:
        for name in names:
            (folder / "model" / name).unlink()

    return edit


def damage(name: str, data: bytes):
    return lambda folder: (folder / "model" / name).write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-99])


def gguf(folder: Path) -> None:
    (folder / "bad.gguf").write_bytes(b"GGUF" + bytes(99))


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model/model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, {"format": "pt"})


def small_vocabulary(folder: Path) -> None:
    tiny_llama.with_tokenizer(folder / "model", 400)
    (folder / "a.txt").write_text(" ".join(f"t{i}" for i in range(400)))


def plain_checkpoint(folder: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_(net, progress=False)
    save_quantized(net, folder / "plain")


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        # Devices.
        (nothing, [*QUANTIZE, "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got tp"),
        (nothing, [*QUANTIZE, "--device", "meta"], "--device: expected cpu, cuda or cuda:N, got m"),
        (nothing, [*EVAL, "--device", "cuda:x"], "--device: expected cpu, cuda or cuda:N, got cu"),
        # --config.
        (nothing, [*QUANTIZE, "--config", "[]"], "--config: expected a JSON object, got list"),
        (nothing, [*QUANTIZE, "--config", "{"], "--config: expected a JSON object, got '{'"),
        (nothing, [*QUANTIZE, "--config", "[" * 9999], "--config: expected a JSON object"),
        (nothing, [*QUANTIZE, "--config", '{"digits": 3}'], "got ['digits']"),
        (nothing, [*QUANTIZE, "--config", '{"tune": "x"}'], "tune: expected an integer"),
        (nothing, [*QUANTIZE, "--config", '{"group_size": {}}'], "group_size: expected one of"),
        (nothing, [*QUANTIZE, "--config", '{"smooth": {"a": 1}}'], "smooth['a']: expected"),
        # Texts.
        (nothing, CALIBRATE[:-1], "--calib: expected text files"),
        (nothing, [*CALIBRATE, "nowhere.txt"], "nowhere.txt: expected a UTF-8 text file"),
        (nothing, [*CALIBRATE, "model"], "model: expected a UTF-8 text file"),
        (nothing, [*CALIBRATE, "empty.txt"], "empty.txt: expected a text, got an empty file"),
        (nothing, [*CALIBRATE, "latin.txt"], "latin.txt: expected a UTF-8 text file"),
        (nothing, [*EVAL, "--length", "8", "--stride", "8"], "stride: expected 1 to length - 1"),
        # Models.
        (nothing, ["quantize", "./nowhere", "-o", "out"], "./nowhere: no such file or folder"),
        (nothing, ["quantize", "nowhere.gguf", "-o", "out"], "nowhere.gguf: no such file"),
        (nothing, ["quantize", "a.txt", "-o", "out"], "a.txt: expected a model folder or a GGUF"),
        (remove("config.json"), QUANTIZE, "model: expected a model's folder, got no config.json"),
        (damage("config.json", b"{"), QUANTIZE, "model: expected a folder with a model, a GGUF"),
        (config(model_type="none"), QUANTIZE, "model: expected a folder with a model, a GGUF"),
        (config(architectures=["NoneForCausalLM"]), QUANTIZE, "has no model NoneForCausalLM"),
        (remove(*TOKENIZER), QUANTIZE, "model: expected a tokenizer that transformers can load"),
        (damage(TOKENIZER[0], b"{}"), QUANTIZE, "model: expected a tokenizer that transformers"),
        (remove("model.safetensors"), QUANTIZE, "model: expected weights that transformers can"),
        (damage("model.safetensors", b"?" * 99), QUANTIZE, "model: expected weights that trans"),
        (truncate, EVAL, "model: expected weights that transformers can load"),
        (lose_a_tensor, QUANTIZE, "model: 1 tensors are missing, model.norm.weight among them"),
        (gguf, ["quantize", "bad.gguf", "-o", "out"], "bad.gguf: expected a tokenizer that tran"),
        (small_vocabulary, [*CALIBRATE, "a.txt"], "tokenizer: expected tokens below 256"),
        (small_vocabulary, EVAL, "tokenizer: expected tokens below 256"),
        (plain_checkpoint, ["eval", "plain", "--text", "a.txt"], "plain: "),
        (nothing, ["import", "model", "-o", "out"], "expected one of compressed-tensors"),
        (nothing, ["import", "nowhere", "-o", "out"], "nowhere"),
        (nothing, ["import", "model", "-o", "model"], "expected a new or empty folder, got one"),
    ],
)
def test_errors_are_one_line(folder, prepare, arguments, message):
    """CHECKLIST 28."""
    prepare(folder)
    there = content(folder)
    assert message in error_of(run(*arguments))
    assert content(folder) == there
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("pretend", "device", "message"),
    [
        ({}, "cuda", "torch has no GPU here. The kernel cannot run: a test."),
        ({"is_available": True, "device_count": 1}, "cuda:1", "expected cuda:0 to cuda:0"),
        ({"is_available": True, "device_count": 1}, "cuda", "The kernel cannot run: a test."),
    ],
)
def test_a_gpu_that_is_not_there_or_not_hopper(folder, monkeypatch, pretend, device, message):
    """CHECKLIST 28: found before anything is loaded."""
    status = _library.LibraryStatus(
        _library.HOST_LIBRARY, None, False, "The kernel cannot run: a test."
    )
    monkeypatch.setattr(_library, "status", lambda: status)
    for name, value in {"is_available": False, **pretend}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(cli_quantize, "load_model", lambda *_: pytest.fail("too late"))
    assert f"--device {device}: {message}" in error_of(run(*QUANTIZE, "--device", device))


@pytest.mark.parametrize(("missing", "source"), [("transformers", "model"), ("gguf", "bad.gguf")])
def test_a_missing_package_is_named(folder, monkeypatch, missing, source):
    """CHECKLIST 28."""
    gguf(folder)
    find = sources.importlib.util.find_spec
    monkeypatch.setattr(
        sources.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    line = error_of(run("quantize", source, "-o", "out"))
    assert f"{source}: needs {missing}: pip install 'liquidgemm[demo]'" in line


def test_a_hub_that_cannot_be_reached(folder, monkeypatch):
    """CHECKLIST 28."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = error_of(run("quantize", "no-such-owner/no-such-model", "-o", "out"))
    assert "no-such-owner/no-such-model: expected a folder with a model, a GGUF file" in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "out of memory: CUDA out of m"),
        (PermissionError(13, "Permission denied", "x/y"), "x/y: Permission denied"),
        (RuntimeError("held_out: the calibrated model is worse"), "error: held_out: the calibrat"),
        (KeyError("logits"), "KeyError: 'logits' (liquidgemm --debug shows where)"),
        (AssertionError(), "AssertionError: "),
        (ValueError("a\n  b\n" + "c" * 9999), "a b ccc"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_is_one_line(folder, monkeypatch, error, message):
    """CHECKLIST 28: and the folder that was to be written is not there."""

    def fail(*args, **kwargs):
        raise error

    there = content(folder)
    monkeypatch.setattr(cli_quantize, "quantize_", fail)
    assert message in error_of(run(*QUANTIZE))
    assert content(folder) == there
    result = run("--debug", *QUANTIZE)
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("liquidgemm: error: ")


# Models of other kinds.


def save(model, folder: Path) -> None:
    subprocess.run(["rm", "-r", folder / "model"], check=True)
    model.save_pretrained(folder / "model")
    tiny_llama.with_tokenizer(folder / "model")


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    return BertForMaskedLM(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "num_mel_bins": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 256}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**layers, **heads, **sizes, **tokens, max_source_positions=32)
    return WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("make", [bert, whisper])
def test_models_are_loaded_as_what_they_are(folder, make):
    """Not as a causal language model with a head of random numbers."""
    model = make()
    save(model, folder)
    result = run(*QUANTIZE)
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "out/config.json").read_text())
    assert written["architectures"] == [type(model).__name__]
    line = error_of(run(*EVAL))
    assert f"model: expected a causal language model, got {type(model).__name__}" in line


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 256, "d_model": 64, "d_kv": 32, "d_ff": 128}
    config = T5Config(**sizes, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "takes"), [(whisper, "input_features"), (t5, "input_ids and decoder_input_ids")]
)
@pytest.mark.parametrize("held_out", [[], ["--held-out", "a.txt"]])
def test_a_model_that_takes_more_than_texts_is_refused_in_one_line(
    folder, monkeypatch, make, takes, held_out
):
    """CHECKLIST 28: before anything is computed."""
    save(make(), folder)
    monkeypatch.setattr(cli_quantize, "quantize_", lambda *_, **__: pytest.fail("too late"))
    line = error_of(run(*QUANTIZE, "--calib", "a.txt", *held_out))
    assert f"which takes {takes}: calibrate it in Python with liquidgemm.quantize_" in line
    assert not (folder / "out").exists()
