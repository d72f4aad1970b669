"""Tables and plots of the benchmark, from a committed record."""

import pytest
from repository import DATA

from bench.core import machine, results, roofline
from bench.report import readme
from bench.report import write as report

# Made-up numbers, written by results.Run.save: 2 shapes, 4 batch sizes, 4 peers and an absent one.
RECORD = DATA / "bench_run.json"


class TestReport:
    """Tables and plots from a committed record, with no GPU."""

    def test_the_record_is_what_the_driver_writes(self, tmp_path):
        run = results.load(RECORD)
        run.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == RECORD.read_text()

    def test_table(self, capsys):
        assert report.main([str(RECORD)]) == 0
        text = capsys.readouterr().out
        run = results.load(RECORD)
        case = run.cases[0]
        ours, bf16 = case.best("liquidgemm", "gemm").us, case.best("bf16", "gemm").us
        fp8 = min(one.us for one in case.measurements if one.peer == "fp8")
        row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == ["1", f"{ours:.2f}"]
        assert cells[4] == f"{ours / run.floors[0]['pdl_us']:.2f}"
        bandwidth = max(floor["bytes"] / floor["pdl_us"] for floor in run.floors)  # no H100
        memory_us = roofline.packed_bytes(case.n, case.k) / bandwidth
        assert cells[5] == f"**{memory_us:.2f}** / - / 0.02"
        assert cells[6] == f"{100 * memory_us / ours:.0f} (memory)"
        assert cells[7] == f"{bf16:.2f} ({bf16 / ours:.2f}x)"
        assert cells[8].startswith(f"{fp8:.2f} (")
        assert cells[9] == "-"
        for part in (
            "Made-up GPU, 132 SMs",
            "Commit 0123456789ab, 2000-01-01",
            "## N = 10240, K = 8192 (llama2-70b qkv)",
            "humming is absent: humming-kernels is not installed",
            "power cap",
            "int8 gemm, unsupported: needs at least 17 tokens (4096x4096 M=1",
        ):
            assert part in text

    def test_every_row_has_every_column(self, capsys):
        report.main([str(RECORD)])
        widths = []
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("|"):
                widths.append(line.count("|"))
            elif widths:
                assert len(set(widths)) == 1, line
                widths = []

    def test_a_partial_run_says_so(self, tmp_path, capsys):
        run = results.load(RECORD)
        run.partial, run.problem, run.floors = True, "interrupted", []
        run.floor_problem = "stream_floor has not been built"
        run.save(tmp_path / "partial.json")
        assert report.main([str(tmp_path / "partial.json")]) == 0
        text = capsys.readouterr().out
        assert "**Partial**: interrupted" in text
        assert "Stream floor: stream_floor has not been built" in text

    def test_files(self, tmp_path):
        pytest.importorskip("matplotlib")
        out = tmp_path / "new/table.md"
        plots = tmp_path / "new/plots"
        assert report.main([str(RECORD), "--markdown", str(out), "--plots", str(plots)]) == 0
        assert out.read_text().startswith("# liquidgemm on Made-up GPU")
        stems = ("time_4096x4096", "time_10240x8192")
        stems += ("roofline_percent", "roofline_tops", "floor_percent")
        expected = {stem + suffix for stem in stems for suffix in (".png", ".svg")}
        assert {path.name for path in plots.iterdir()} == expected
        assert all(path.stat().st_size > 5000 for path in plots.iterdir())

    def test_plots_of_what_little_there_is(self, tmp_path):
        pytest.importorskip("matplotlib")
        run = results.load(RECORD)
        run.cases, run.floors = run.cases[:1], []
        assert len(report.write_plots(run, tmp_path)) == 6
        run.cases = []
        assert report.write_plots(run, tmp_path) == []

    def test_without_matplotlib(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert report.main([str(RECORD), "--plots", str(tmp_path)]) == 1
        assert "pip install matplotlib" in capsys.readouterr().err

    def test_unreadable_results(self, tmp_path, capsys):
        assert report.main([str(tmp_path / "none.json")]) == 1
        assert "none.json" in capsys.readouterr().err


def test_readme_table_says_how_to_repeat_the_run():
    command = "python -m bench --m 1 --stream-floor x/floor --commit abc --json r.json"
    expected = "python -m bench gemm --m 1 --json r.json"
    assert readme.reproduce(command) == expected
    assert readme.reproduce(expected) == expected
    assert readme.reproduce("python -m bench sweep --json r.json").startswith(
        "python -m bench sweep "
    )


def test_readme_table_stands_between_its_markers():
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    content = readme.table(results.load(RECORD), "bench/results/x/results.json")
    replaced = readme.replace_between(text, content)
    assert replaced.startswith("before\n")
    assert replaced.endswith("after\n")
    assert "old" not in replaced
    assert content.count("\n| ") == 1 + len(results.load(RECORD).shapes)
    assert readme.replace_between(replaced, content) == replaced
    with pytest.raises(SystemExit, match="expected the lines"):
        readme.replace_between("no markers", content)


def test_the_readme_has_one_weight_and_the_ratios_to_its_peers():
    run = results.load(RECORD)
    lines = readme.short_table(run, 4096, 4096, (1, 16)).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:4]]
    assert [row[0] for row in rows] == ["1", "16"]
    case = next(case for case in run.cases_of(4096, 4096) if case.m == 16)
    ours, bf16 = (case.best(peer, "gemm").us for peer in ("liquidgemm", "bf16"))
    assert rows[1][1] == f"{ours:.2f}"
    assert rows[1][2] == f"{bf16:.2f} ({bf16 / ours:.2f}x)"
    with pytest.raises(SystemExit, match=r"expected 4096 x 4096 at M = \[3\]"):
        readme.short_table(run, 4096, 4096, (1, 3))


def test_documents_have_the_tables_of_the_newest_results(tmp_path, monkeypatch):
    """What `make readme-table` would write is what stands there."""
    monkeypatch.chdir(machine.ROOT)
    for name, file in (("README", readme.README), ("PERFORMANCE", readme.PERFORMANCE)):
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        monkeypatch.setattr(readme, name, copy)
    readme.main([])
    for name in ("README.md", "docs/performance.md"):
        file = machine.ROOT / name
        assert (tmp_path / file.name).read_text() == file.read_text(), name
