"""``liquidgemm quantize --target`` and ``--max-loss``."""

import json

import pytest
from cli_runs import (  # noqa: F401
    QUANTIZE,
    error_of,
    folder_fixture,
    original_fixture,
    run,
)
from folders import content

from liquidgemm.cli import quantize as cli_quantize

TEXTS = ["--calib", "a.txt", "--held-out", "b.txt"]


@pytest.fixture(name="texts")
def texts_fixture(folder):
    (folder / "b.txt").write_text(" ".join(f"t{i * 7 % 250}" for i in range(999)))
    return folder


def test_the_choice_is_written_beside_the_checkpoint(texts):
    result = run(*QUANTIZE, *TEXTS, "--target", "9", "--resume", "blocks")
    assert result.exit_code == 0, result.output
    assert "recipes, by perplexity on held-out data" in result.stdout
    assert "chosen: " in result.stdout
    written = json.loads((texts / "out/choice.json").read_text())
    assert written["target"] == 9
    assert written["max_loss"] is None
    (chosen,) = (t for t in written["trials"] if t["outcome"] == "chosen")
    assert chosen["recipe"] == written["chosen"]
    assert chosen["config"] == written["config"]
    assert json.loads((texts / "out/liquidgemm.json").read_text())["config"] == written["config"]
    assert json.loads((texts / "out/quantization.json").read_text())["layers"]
    assert (texts / "out/choice.png").exists()
    assert json.loads((texts / "blocks/choice.json").read_text())["trials"]
    held_out = ["--text", "b.txt", "--reference", "model", "--length", "32", "--stride", "16"]
    assert run("eval", "out", *held_out).exit_code == 0


def test_what_nothing_meets_is_refused_with_the_table(texts):
    """CHECKLIST 28: what was tried is printed, and no checkpoint is written."""
    there = content(texts)
    result = run(*QUANTIZE, "--held-out", "b.txt", "--max-loss", "1e-9", "--target", "8.6")
    line = error_of(result)
    assert "max_loss: no recipe has at most 8.6 bits per weight and perplexity of" in line
    assert "recipes, by perplexity on held-out data" in result.stdout
    assert "not tried" in result.stdout
    assert content(texts) == there
    line = error_of(run(*QUANTIZE, *TEXTS, "--target", "3"))
    assert "target: expected at least" in line
    assert content(texts) == there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "5"], "--held-out: expected text files that recipes are judged by"),
        (["--max-loss", "5", *TEXTS, "--method", "gptq"], "--method: expected to be left out"),
        (["--max-loss", "5", *TEXTS, "--augment", "64"], "--augment: expected to be left out"),
        (["--max-loss", "5", *TEXTS, "--gate", "warn"], "--gate: expected to be left out"),
        (["--target", "5", *TEXTS, "--dry-run"], "--dry-run: expected to be left out"),
        (["--target", "5", "--held-out", "a.txt", "--tokens", "9"], "--tokens: expected --calib"),
        (["--target", "5", *TEXTS, "--resume", "out"], "--resume: expected a folder apart from"),
    ],
)
def test_options_beside_a_demand(texts, monkeypatch, options, message):
    """CHECKLIST 28: before anything is loaded."""
    monkeypatch.setattr(cli_quantize, "load_model", lambda *_: pytest.fail("too late"))
    assert message in error_of(run(*QUANTIZE, *options))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize(("option", "name"), [("--target", "target"), ("--max-loss", "max_loss")])
def test_a_demand_that_is_none(texts, option, name, value):
    line = error_of(run(*QUANTIZE, "--held-out", "b.txt", option, value))
    assert f"{name}: expected a finite number > 0" in line
    assert not (texts / "out").exists()


def test_a_demand_in_words_is_wrong_usage(texts):
    assert run(*QUANTIZE, "--held-out", "b.txt", "--target", "small").exit_code == 2


def test_fields_that_recipes_choose(texts):
    more = json.dumps({"keep": ["q_proj"]})
    line = error_of(run(*QUANTIZE, *TEXTS, "--target", "9", "--config", more))
    assert "config: expected the default keep, which recipes choose" in line
