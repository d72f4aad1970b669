"""What `bench serve` asks of vLLM, and what it records where there is none."""

import json

import pytest
from engine_process import answer

from bench.core import engine
from bench.decoder.sizes import MODELS
from bench.suites import serve
from liquidgemm import LiquidGemmConfig

TINY = MODELS["tiny"]


def test_formats_are_known():
    assert serve.parse_formats("fp8, w4a8") == ["fp8", "w4a8"]
    for text in ("int3", ""):
        with pytest.raises(ValueError, match="expected formats among bf16"):
            serve.parse_formats(text)


def test_our_config_is_that_of_a_checkpoint():
    assert "quantization_config" not in engine.config_of(TINY, "fp8")
    for name in ("w4a8", "w4a8-head"):
        settings = LiquidGemmConfig(**engine.config_of(TINY, name)["quantization_config"])
        assert len(settings.layers) == 7 * TINY.layers + (name == "w4a8-head")


def test_room_is_for_the_largest_batch():
    words = ["--device", "cpu", "--models", "tiny", "--batch", "1,8", "--tokens", "100"]
    options = serve.parse([*words, "--steps", "10", "--batched-tokens", "58", "--prompt", "9"])
    # 8 prompts of 100 in steps of 58, 8 of which may decode already: 16 of them.
    assert engine.tokens_out(8, options) == 16 + 10 + 2
    blocks = 8 * 8 + 64  # of 128 tokens each
    assert engine.kv_bytes(TINY, options) == blocks * 16 * TINY.kv_values * 2
    options.kv = "fp8"
    assert engine.kv_bytes(TINY, options) == blocks * 16 * TINY.kv_values


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Of a record, with processes that stand in for engines."""
    measure = serve.measure
    monkeypatch.setattr(serve, "measure", lambda *given: measure(*given, target=answer))

    def run(*words):
        out = tmp_path / "serve.json"
        more = ["--models", "tiny", "--device", "cpu", "--json", str(out), "--commit", "c0ffee"]
        assert serve.main([*more, *words]) == 1
        return json.loads(out.read_text())["rows"]

    return run


def test_engines_measure_in_turn(rows, capsys):
    words = ["--formats", "w4a8,bf16,fp8", "--at-once", "--batch", "1,4"]
    ours, failed, dead = rows(*words, "--budget", "100")
    assert [step["batch"] for step in ours["steps"]] == [1, 4]
    assert ours["status"] == "ok"
    assert "reason" not in ours
    assert (failed["status"], failed["reason"]) == ("failed", "OutOfMemoryError: no room")
    assert [step["batch"] for step in dead["steps"]] == [1]
    assert dead["prompt"]["first_token_s"] == 0.1
    assert dead["reason"] == "it ended with 0 before a batch of 4"
    assert {row["engines_at_once"] for row in (ours, failed, dead)} == {3}
    said = capsys.readouterr().out
    assert "bf16: failed OutOfMemoryError: no room" in said
    assert "prompt of 4096 tokens 100.0 ms" in said
    turns = [said.index(f"{name} kv auto  batch    1") for name in ("w4a8     ", "fp8      ")]
    assert turns == sorted(turns)
    assert turns[1] < said.index("batch    4")


def test_an_engine_that_does_not_start_in_time_is_recorded(rows):
    (late,) = rows("--formats", "humming", "--budget", "3")
    assert (late["status"], late["reason"]) == ("failed", "the budget ended before it started")


def test_wrong_numbers_are_refused(capsys):
    wrong = (["--tokens", "0"], ["--batch", "max"], ["--batched-tokens", "256"])
    for words in wrong:
        with pytest.raises(SystemExit):
            serve.main(["--device", "cpu", *words])
    said = capsys.readouterr().err
    assert "expected 1 or more, got 0" in said
    assert "--batched-tokens: expected more than the largest batch, 256, got 256" in said
