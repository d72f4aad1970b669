"""Options that say two things, or say something that nothing would come of, are refused."""

import json
import os

import pytest
from cli_runs import (  # noqa: F401
    CALIBRATE,
    QUANTIZE,
    error_of,
    folder_fixture,
    original_fixture,
    run,
)
from folders import content
from fresh_process import run_python

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.cli import quantize as cli_quantize


@pytest.mark.parametrize(
    ("option", "field"),
    [
        (["--method", "rtn"], {"method": "search"}),
        (["--method", "search"], {"method": "rtn"}),  # the default, said all the same
        (["--smooth"], {"smooth": False}),
        (["--rotate"], {"rotate": False}),
        (["--augment", "64"], {"augment": {"q_proj": 64}}),
        (["--keep", "q_proj"], {"keep": []}),
        (["--bits", "q_proj=6"], {"bits": {}}),
        (["--budget", "5"], {"budget": 6.0}),
        (["--skip", "q_proj"], {"skip": ["k_proj"]}),
        (["--gate", "off"], {"gate": "warn"}),
    ],
)
def test_a_field_that_an_option_sets_too(folder, monkeypatch, option, field):
    """CHECKLIST 28: neither goes before the other."""
    monkeypatch.setattr(cli_quantize, "load_model", lambda *_: pytest.fail("too late"))
    line = error_of(run(*QUANTIZE, *option, "--config", json.dumps(field)))
    assert f"--config: expected fields that no other option sets, got {next(iter(field))!r}" in line


def test_fields_of_options_that_are_not_given(folder):
    more = {"method": "rtn", "skip": ["lm_head", "q_proj"], "seed": 3}
    result = run(*QUANTIZE, "--keep", "k_proj", "--config", json.dumps(more))
    assert result.exit_code == 0, result.output
    recorded = json.loads((folder / "out/liquidgemm.json").read_text())["config"]
    expected = LiquidConfig(**{**more, "skip": tuple(more["skip"])}, keep=("k_proj",))
    assert LiquidConfig._from_dict(recorded) == expected


def test_bits_of_patterns(folder):
    result = run(*QUANTIZE, "--bits", "k_proj=8", "--bits", "*=6")
    assert result.exit_code == 0, result.output
    recorded = json.loads((folder / "out/liquidgemm.json").read_text())["config"]
    assert LiquidConfig._from_dict(recorded) == LiquidConfig(bits={"k_proj": 8, "*": 6})
    assert recorded["bits"] == [["k_proj", 8], ["*", 6]]


DATA = ["--calib", "a.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "99"], "--tokens: expected --calib beside it"),
        (["--bits", "q_proj"], "--bits: expected PATTERN=4, 6 or 8, got 'q_proj'"),
        (["--bits", "q_proj=six"], "--bits: expected PATTERN=4, 6 or 8, got 'q_proj=six'"),
        (["--bits", "q_proj=5"], "bits: expected one of (4, 6, 8) per pattern"),
        (["--bits", "a=6", "--bits", "a=8"], "--bits: expected a pattern once, got 'a' again"),
        (["--budget", "5"], "--calib: expected text files for budget, got none"),
        (["--budget", "0"], "budget: expected a finite number of bits per weight > 0"),
        (["--budget", "5", "--bits", "*=6"], "bits: expected none with a budget"),
        (["--held-out", "a.txt"], "--held-out: expected --calib beside it"),
        (["--resume", "blocks"], "--resume: expected --calib beside it"),
        (["--gate", "warn"], "--gate warn: expected --held-out beside it"),
        ([*DATA, "--gate", "raise"], "--gate raise: expected --held-out beside it"),
        (["--config", '{"tune": 0, "tune": 1}'], "expected each key once, got 'tune' several"),
        (["--config", '{"damping": true}'], "damping: expected a finite number >= 0, got True"),
        (["--config", '{"shrinkage": true}'], "shrinkage: expected a number from 0 to 1, got True"),
        (["--config", '{"group_size": 64.0}'], "group_size: expected one of"),
        ([*DATA, "--resume", "model"], "--resume: expected a folder outside of"),
        ([*DATA, "--resume", "model/blocks"], "--resume: expected a folder outside of"),
        ([*DATA, "--resume", "out"], "--resume: expected a folder apart from"),
        ([*DATA, "--resume", "out/blocks"], "--resume: expected a folder apart from"),
        (["-o", "b/out", *DATA, "--resume", "b"], "--resume: expected a folder apart from"),
    ],
)
def test_options_that_nothing_would_come_of(folder, monkeypatch, options, message):
    """CHECKLIST 28: before anything is loaded."""
    there = content(folder)
    monkeypatch.setattr(cli_quantize, "load_model", lambda *_: pytest.fail("too late"))
    assert message in error_of(run(*QUANTIZE, *options))
    assert content(folder) == there


def test_blocks_lie_among_nothing_else(folder):
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("mine")
    there = content(folder)
    line = error_of(run(*CALIBRATE, "a.txt", "--resume", "notes"))
    assert "resume: notes: expected a new or empty folder, or one of an interrupted cali" in line
    assert "that holds mine.txt" in line
    assert content(folder) == there


@pytest.mark.parametrize("options", [[], ["--method", "rtn"], ["--dry-run"]])
def test_a_quantized_source(folder, options):
    """The new settings would not be those of its layers."""
    assert run("quantize", "model", "-o", "first").exit_code == 0
    line = error_of(run("quantize", "first", "-o", "out", *options))
    assert "first: expected a float model, got one that is quantized already" in line
    assert not (folder / "out").exists()


def test_a_dtype_for_a_quantized_model_alone(folder):
    """It keeps its own; beside a float reference the option is that one's."""
    assert run("quantize", "model", "-o", "out").exit_code == 0
    evaluate = ["eval", "out", "--text", "a.txt", "--tokens", "64", "--dtype", "float16"]
    for reference in ([], ["--reference", "out"]):
        line = error_of(run(*evaluate, *reference))
        assert "--dtype: expected a model that is not quantized, got out" in line
    assert run(*evaluate, "--reference", "model").exit_code == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": ("lm_head",)}, "keep: 'lm_head' matches none"),  # it is skipped
        ({"skip": ("lm_head", "qq_proj")}, "skip: 'qq_proj' matches nothing in the model"),
        ({"skip": ("lm_head", "q_proj"), "keep": ("k_proj",), "augment": {"mlp.*": 64}}, None),
    ],
)
def test_patterns_that_match_nothing_are_warned_of(folder, recwarn, fields, message):
    """A misspelt one would leave a layer to the defaults."""
    import tiny_llama

    model = tiny_llama.load(folder / "model")
    if message is None:
        quantize_(model, LiquidConfig(**fields), progress=False)
        assert not [w for w in recwarn if " matches no" in str(w.message)]
        return
    with pytest.warns(UserWarning, match=message):
        quantize_(model, LiquidConfig(**fields), progress=False)


# Whatever it runs in.


@pytest.mark.parametrize("arguments", [["info"], [*QUANTIZE[:-1], os.fsdecode(b"out\xfe")]])
def test_a_terminal_without_the_characters(folder, arguments):
    """What is written is not lost for their sake: µ, and a byte in a name that is no UTF-8."""
    code = "from liquidgemm.cli.main import app; app()"
    result = run_python(code, *arguments, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "\\xb5s" in result.stdout or "\\udcfe" in result.stdout
    if arguments[-1] != "info":
        assert (folder / arguments[-1] / "model.safetensors").exists()
