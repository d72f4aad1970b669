"""`bench exact` on two processes without GPUs: what it compares, not what it times."""

import json

import pytest

from bench.suites import exact


def test_two_processes_are_compared_with_one(tmp_path):
    out = tmp_path / "exact.json"
    words = ["--device", "cpu", "--model", "tiny", "--batch", "1,5", "--json", str(out)]
    assert exact.main([*words, "--commit", "c0ffee"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layer"], row["m"]) for row in rows] == [
        (layer, m) for layer in ("o", "down") for m in (1, 5)
    ]
    assert all(row["equal"] and row["floats_error"] > 0 for row in rows)


def test_a_batch_without_a_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        exact.main(["--device", "cpu", "--batch", "max"])
    assert "expected numbers, got max" in capsys.readouterr().err
