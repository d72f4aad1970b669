"""What `bench serve` asks of vLLM, and what it records where there is none."""

import json

import pytest

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
    assert "quantization_config" not in serve.config_of(TINY, "fp8")
    settings = LiquidGemmConfig(**serve.config_of(TINY, "w4a8")["quantization_config"])
    assert len(settings.layers) == 7 * TINY.layers


def test_a_format_that_does_not_end_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "in_a_process", lambda sizes, name, *_: _failed(sizes, name))
    out = tmp_path / "serve.json"
    words = ["--models", "tiny", "--device", "cpu", "--formats", "bf16", "--json", str(out)]
    assert serve.main([*words, "--commit", "c0ffee"]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "failed"
    assert "bf16: failed no engine" in capsys.readouterr().out


def _failed(sizes, name):
    return {
        "model": sizes.name,
        "format": name,
        "status": "failed",
        "reason": "no engine",
        "steps": [],
    }


def test_wrong_numbers_are_refused(capsys):
    for words in (["--tokens", "0"], ["--batch", "max"]):
        with pytest.raises(SystemExit):
            serve.main(["--device", "cpu", *words])
    assert "expected 1 or more, got 0" in capsys.readouterr().err
