"""Tables and plots of `bench serve`."""

import json
from pathlib import Path

import pytest

from bench.core.results import BadResults
from bench.report import serve

RESULTS = Path(__file__).resolve().parents[3] / "bench/results/h100-sxm/2026-11-28"


def record(started: str, *rows: dict) -> dict:
    about = {"machine": {"gpu": "H"}, "commit": "c0ffee", "command": "bench serve"}
    return {"schema": 1, "started": started, "rows": list(rows)} | about


def row(form: str, step_ms: float, **more) -> dict:
    step = {"batch": 4, "step_ms": step_ms, "prefill_s": 0.1, "tokens_per_s": 1000 / step_ms}
    found = {"model": "m", "layers": 2, "kv": "auto", "tokens_in": 9, "format": form}
    found |= {"steps": [step], "status": "ok", "started_s": 5.0, "kv_tokens": 77}
    return found | {"methods": ["M"], "bytes_per_weight": 0.5} | more


def test_the_last_run_of_a_format_counts_and_ratios_are_of_one_table():
    records = [record("1", row("fp8", 9.0), row("w4a8", 2.0)), record("2", row("fp8", 3.0))]
    text = serve.markdown(records)
    assert "| requests | fp8 | w4a8 | over fp8 |" in text
    assert "| 4 | 3.00 | 2.00 | 1.50x |" in text
    assert "| 4 | 333 | 500 | 1.50x |" in text  # tokens/s: more is better
    assert "| fp8 | 5 | 77 |" in text


def test_what_failed_is_said_and_room_of_engines_together_is_not():
    late = row("humming", 1.0, steps=[], status="failed", reason="the budget ended")
    text = serve.markdown([record("1", late, row("w4a8", 2.0, engines_at_once=2))])
    assert "Not measured: m humming: the budget ended." in text
    assert "| w4a8 | 5, 2 at once |  |" in text


def test_of_what_is_kept(tmp_path, capsys):
    files = [str(RESULTS / name) for name in ("serve_turns.json", "serve_turns_head.json")]
    assert serve.main([*files, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.split()
    assert [Path(one).name for one in said] == [
        "serve.md",
        "serve_llama3-8b_32_auto_384.png",
        "serve_llama3-8b_32_auto_384.svg",
    ]
    assert "LiquidLinearMethod" in (tmp_path / "serve.md").read_text()


def test_other_files_are_refused(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"schema": 7}))
    with pytest.raises(BadResults, match="expected results of `bench serve`, schema 1"):
        serve.read([file])
    assert serve.main([str(file)]) == 1
    assert "serve-report: error" in capsys.readouterr().err
