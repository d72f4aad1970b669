"""``python -m bench cpu``: what it records, and its table and plot from the record alone."""

import json

import pytest
import torch

from bench.report import cpu as report
from bench.suites import cpu as suite


@pytest.fixture
def folder(tmp_path):
    threads, engine = torch.get_num_threads(), torch.backends.quantized.engine
    words = ["--shapes", "192x128", "--m", "1,20", "--threads", "1,2", "--seconds", "0.01"]
    assert suite.main([*words, "--cold-mb", "0", "--folder", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine
    return tmp_path


def test_every_candidate_computes_the_product(folder):
    result = json.loads((folder / "cpu.json").read_text())
    assert [(case["m"], case["threads"]) for case in result["cases"]] == [
        (1, 1),
        (1, 2),
        (20, 1),
        (20, 2),
    ]
    for case in result["cases"]:
        names = set(case["times"])
        assert {"liquidgemm", "float32", "bfloat16"} < names
        for name, of in case["times"].items():
            assert 0 < of["min_us"] <= of["median_us"], name
            # Four bits of a normal distribution leave about 8 %, bfloat16 less than 1 %.
            limit = 1e-5 if name == "float32" else 0.01 if name == "bfloat16" else 0.15
            assert of["error"] < limit, (name, of)
    for key in ("processor", "kernel", "commit", "date", "command", "copy_bytes_per_s"):
        assert result[key], key


def test_table_and_plot_come_from_the_record(folder):
    text = (folder / "cpu.md").read_text()
    (folder / "cpu.md").unlink()
    (folder / "cpu.svg").unlink()
    files = report.write(folder)
    assert (folder / "cpu.md").read_text() == text
    assert all(file.stat().st_size > 0 for file in files)
    rows = [line for line in text.splitlines() if line.startswith("| 192 x 128")]
    assert len(rows) == 4


def test_ratios_are_other_over_ours():
    times = {"liquidgemm": {"min_us": 10.0}, "float32": {"min_us": 25.0}}
    case = {"n": 64, "k": 64, "m": 1, "threads": 1, "times": times}
    assert "| 10 | 0.2 | 2.50x |" in report.table({"cases": [case]})


def test_a_lowered_instruction_set_reaches_the_process(tmp_path):
    """In a process of its own, which the variables of the libraries reach before torch loads."""
    if "avx2" not in suite.liquidgemm.cpu_kernels():
        pytest.skip("no AVX2 here")
    words = ["--isa", "avx2", "--shapes", "64x64", "--m", "1", "--threads", "1"]
    words += ["--seconds", "0.01", "--cold-mb", "0", "--folder", str(tmp_path)]
    assert suite.main(words) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert (result["kernel"], result["isa"]) == ("avx2", "avx2")
