"""The benchmark without a GPU: arguments, statistics, records, and the driver on a fake GPU."""

import contextlib
import json
import types

import pytest
import torch
from repository import DATA

from bench import __main__ as command
from bench.core import machine, results, roofline, shapes, stream_floor, timing
from bench.peers import PEERS, Unsupported, parse_peers
from bench.peers.base import WrongResult, check_result, exact_product, poison, sample_rows
from bench.peers.liquid import Liquid
from bench.peers.native import Bf16, Int8
from bench.report import readme, tables
from bench.report import write as report
from bench.suites import driver
from bench.suites.gemm import main

# Made-up numbers, written by results.Run.save: 2 shapes, 4 batch sizes, 4 peers and an absent one.
RECORD = DATA / "bench_run.json"


class TestArguments:
    def test_model_names_and_sizes_are_merged(self):
        parsed = shapes.parse_shapes("llama3-8b, 64x128, mixtral")
        assert [str(s) for s in parsed] == [
            "6144x4096",
            "4096x4096",
            "28672x4096",
            "4096x14336",
            "64x128",
        ]
        assert parsed[2].labels == ("llama3-8b gate_up", "mixtral expert gate_up")

    def test_targets_are_seven_shapes(self):
        assert len(shapes.parse_shapes("targets")) == 7

    @pytest.mark.parametrize("text", ["llama4", "0x64", "64x", "64x64x64", "", "-1x4"])
    def test_unknown_shape(self, text):
        with pytest.raises(ValueError, match=r"neither NxK nor one of|no shapes"):
            shapes.parse_shapes(text)

    def test_tokens(self):
        assert shapes.parse_tokens("16,1, 16") == [1, 16]
        for text in ("0", "1.5", "x", ""):
            with pytest.raises(ValueError, match="tokens"):
                shapes.parse_tokens(text)

    def test_peers(self):
        assert parse_peers("fp8, bf16,fp8") == ["fp8", "bf16"]
        assert parse_peers("") == []
        with pytest.raises(ValueError, match="'marlin' is none of bf16"):
            parse_peers("marlin")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shapes", "llama4"], "'llama4' is neither NxK nor one of llama3-8b"),
            (["--m", "0"], "not a positive number of tokens"),
            (["--against", "cutlass"], "is none of bf16"),
            (["--ops", "conv"], "is none of gemm, linear"),
            (["--seconds", "0"], "not a positive number"),
        ],
    )
    def test_command_line_errors(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_why(self, capsys):
        with pytest.raises(SystemExit):
            main([])
        assert "The Hopper kernel cannot run here" in capsys.readouterr().err


class TestTiming:
    def test_percentiles_interpolate(self):
        assert timing.percentile([4, 1, 3, 2, 5], 0.5) == 3
        assert timing.percentile([0, 10], 0.1) == pytest.approx(1)
        assert timing.percentile([7], 0.9) == 7

    def test_summary(self):
        summary = timing.summarize([float(i) for i in range(101)], calls=4, copies=2)
        assert (summary.median_us, summary.p10_us, summary.p90_us) == (50, 10, 90)
        assert (summary.min_us, summary.rounds, summary.calls) == (0, 101, 4)

    @pytest.mark.parametrize("weight_bytes", [1, 8_912_896, 150_000_000, 10**9])
    def test_copies_exceed_the_cache(self, weight_bytes):
        copies = timing.copies_for_cold_l2(weight_bytes, 52_428_800)
        assert copies >= 2
        assert copies * weight_bytes >= 3 * 52_428_800

    @pytest.mark.parametrize("copies", [2, 18, 1000])
    @pytest.mark.parametrize("call_us", [0.0, 4.6, 5000.0])
    def test_graphs_hold_whole_rotations(self, copies, call_us):
        calls = timing.calls_per_graph(copies, call_us)
        assert calls >= copies
        assert calls % copies == 0
        assert calls <= max(copies, timing.MAX_CALLS * 1.5)

    def test_rounds(self):
        assert timing.rounds_in(1.0, 10_000) == 100
        assert timing.rounds_in(0.0, 10_000) == timing.MIN_ROUNDS
        assert timing.rounds_in(1e6, 1) == timing.MAX_ROUNDS


class TestRoofline:
    def test_agrees_with_the_goals(self):
        # bytes and mma of three rows of the goals for an H100
        for n, k, m, memory_us, mma_us in (
            (4096, 4096, 512, 2.9, 9.8),
            (57344, 8192, 1, 80.2, 0.5),
            (8192, 28672, 4096, 40.1, 1099.5),
        ):
            roof = roofline.roofline(m, n, k)
            assert roof.memory_us == pytest.approx(memory_us, abs=0.06)
            assert roof.mma_us == pytest.approx(mma_us, abs=0.06)
            assert roof.us == max(roof.memory_us, roof.mma_us)

    def test_padding_counts(self):
        assert roofline.packed_bytes(65, 1) == 2 * 2176

    def test_one_roof_for_all_shapes(self):
        for m in (1, 64, 149, 150, 4096):
            one = roofline.roofline(m, 4096, 14336)
            speed = roofline.operations(m, 4096, 14336) / one.us
            assert roofline.roof_ops_per_us(m) == pytest.approx(speed)
        crossover = roofline.crossover_tokens()
        assert 149 < crossover < 150
        assert roofline.roofline(149, 64, 64).binds == "memory"
        assert roofline.roofline(150, 64, 64).binds == "mma"


class TestMachine:
    def test_a_command_line_names_no_folders_of_the_machine(self):
        words = ["--shapes", "64x64", "--json", "/home/me/results.json", "--against", "bench/x"]
        assert machine.command_line("gemm", words) == (
            "python -m bench gemm --shapes 64x64 --json results.json --against bench/x"
        )

    def test_snapshot_line(self):
        line = "1755, 2619, 612.35, 700.00, 61, P0, 0x0000000000000004"
        record = machine.parse_snapshot(line)
        assert record["sm_mhz"] == 1755
        assert record["power_w"] == 612.35
        assert record["pstate"] == "P0"
        assert record["slowed_by"] == ["power cap"]

    def test_unknown_values(self):
        record = machine.parse_snapshot("[N/A], 2619, [N/A], 700, 61, P0, [N/A]")
        assert record["sm_mhz"] is None
        assert record["slowed_by"] is None

    def test_absent_tools_are_no_error(self):
        assert machine.run_text(["no-such-program-anywhere"]) is None


class TestStreamFloor:
    TABLE = (
        "# a GPU\nN\tK\tbytes\tsingle_us\tpdl_us\tsingle_TBps\tpdl_TBps\n"
        "64\t128\t4352\t2.500\t1.000\t0.002\t0.004\n"
    )

    def program(self, tmp_path, script):
        path = tmp_path / "stream_floor"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def test_runs_the_program(self, tmp_path):
        program = self.program(tmp_path, f"cat <<'END'\n{self.TABLE}END")
        records, problem = stream_floor.measure(program, [shapes.Shape(64, 128)])
        assert problem is None
        expected = {"n": 64, "k": 128, "bytes": 4352, "single_us": 2.5, "pdl_us": 1.0}
        assert records == [expected]

    def test_problems_are_told(self, tmp_path):
        assert "has not been built" in stream_floor.measure(tmp_path / "none", [])[1]
        program = self.program(tmp_path, "echo no GPU >&2; exit 1")
        assert stream_floor.measure(program, []) == ([], "no GPU")


class TestPeers:
    """The references, against the ops' own CPU path and torch."""

    def test_exact_product(self):
        x = torch.randint(-127, 128, (3, 100), dtype=torch.int8)
        w = torch.randint(-128, 128, (70, 100), dtype=torch.int8)
        assert torch.equal(exact_product(x, w).long(), x.long() @ w.long().T)

    @pytest.mark.parametrize("op", ["gemm", "linear"])
    def test_liquidgemm_is_checked_bit_for_bit(self, op):
        peer = Liquid(torch.randn(70, 130, dtype=torch.bfloat16))
        way = next(way for way in Liquid.ways if way.op == op)
        tokens = peer.tokens(way, torch.randn(5, 130, dtype=torch.bfloat16))
        out = peer.call(way, tokens, peer.new_copy())
        rows = sample_rows(5, 64, out.device)
        assert check_result(peer, way, tokens, out, rows) == 0
        out[4, 69] = out[4, 69].nextafter(torch.tensor(torch.inf, dtype=out.dtype))
        with pytest.raises(WrongResult, match=r"1 of 350 values .* row 4, column 69"):
            check_result(peer, way, tokens, out, rows)

    def test_poison_is_noticed_outside_the_sampled_rows(self):
        for cls in (Bf16, Int8):
            peer = cls(torch.randn(64, 64, dtype=torch.bfloat16))
            way = cls.ways[0]
            tokens = peer.tokens(way, torch.randn(40, 64, dtype=torch.bfloat16))
            out = peer.call(way, tokens, peer.new_copy())
            rows = torch.tensor([0, 39])
            check_result(peer, way, tokens, out, rows)
            poison(out[20])
            with pytest.raises(WrongResult, match="64 of 2560 values were not written"):
                check_result(peer, way, tokens, out, rows)

    def test_errors_within_tolerance_are_reported(self):
        peer = Bf16(torch.randn(64, 256, dtype=torch.bfloat16))
        tokens = torch.randn(8, 256, dtype=torch.bfloat16)
        out = peer.call(peer.ways[0], tokens, peer.new_copy())
        rows = sample_rows(8, 64, out.device)
        assert 0 < check_result(peer, peer.ways[0], tokens, out, rows) < 0.01
        with pytest.raises(WrongResult, match="relative error"):
            check_result(peer, peer.ways[0], tokens, out * 1.02, rows)

    def test_sampled_rows_span_the_batch(self):
        rows = sample_rows(8192, 64, torch.device("cpu"))
        assert len(rows.unique()) == 64
        assert (rows[0], rows[-1]) == (0, 8191)
        assert sample_rows(1, 64, torch.device("cpu")).tolist() == [0]

    def test_absent_packages_say_so(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert PEERS["humming"].why_absent() == "humming-kernels is not installed"
        assert PEERS["gemlite"].why_absent() == "gemlite is not installed"


class FakeGraph:
    """Runs its calls when replayed, into the output that was captured."""

    def __init__(self, calls):
        self.calls = calls
        self.out = calls[0]()

    def replay(self):
        for call in self.calls:
            self.out.copy_(call())

    def reset(self):
        pass


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        FakeEvent.clock += 0.25
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch):
    """Just enough of torch.cuda for the driver to run on CPU tensors."""

    def capture(calls, count):
        calls = [calls[i % len(calls)] for i in range(count)]
        graph = FakeGraph(calls)
        return driver.CallGraph(graph, count, graph.out)

    gpu = types.SimpleNamespace(
        name="Fake GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=10_000,
        total_memory=1,
        memory_clock_rate=3_201_000,  # an H200's: 4.92 TB/s
        memory_bus_width=6144,
    )
    stream = types.SimpleNamespace(synchronize=lambda: None)
    for name, value in {
        "get_device_properties": lambda device: gpu,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "Event": FakeEvent,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(driver, "capture", capture)
    monkeypatch.setattr(timing, "GRAPH_US", 100.0)
    monkeypatch.setattr(Liquid, "why_absent", classmethod(lambda cls: None))
    return gpu


def run_driver(tmp_path, peers=("liquidgemm", "bf16", "int8"), tokens=(1, 20), **options):
    lines = []
    defaults = {
        "shapes": [shapes.Shape(64, 128), shapes.Shape(128, 64, ("a model",))],
        "tokens": list(tokens),
        "peers": list(peers),
        "ops": ["gemm", "linear"],
        "seconds": 0.2,
        "json": tmp_path / "run.json",
        "floor_program": tmp_path / "none",
        "command": "python -m bench",
        "commit": "0123456789ab",
        "say": lines.append,
    }
    run = driver.Driver(driver.Options(**(defaults | options)), torch.device("cpu")).run()
    return run, "\n".join(lines)


class TestDriver:
    def test_a_whole_run(self, fake_gpu, tmp_path):
        run, said = run_driver(tmp_path)
        assert not run.partial
        assert [(c.n, c.m) for c in run.cases] == [(64, 1), (64, 20), (128, 1), (128, 20)]
        first, second = run.cases[:2]
        assert first.best("liquidgemm", "gemm").error == 0
        assert "on 132 SMs, 4.92 TB/s: plan t8" in first.best("liquidgemm", "gemm").detail
        assert first.best("liquidgemm", "linear").time.rounds >= timing.MIN_ROUNDS
        assert first.best("bf16", "gemm") is first.best("bf16", "linear") is not None
        assert first.best("int8", "gemm") is None
        assert first.measurements[-1].status == "unsupported"
        assert "at least 17 tokens" in first.measurements[-1].reason
        assert second.best("int8", "gemm") is not None
        assert "has not been built" in run.floor_problem
        assert "[4/4" in said

    def test_the_record_survives_the_file(self, fake_gpu, tmp_path):
        run, _ = run_driver(tmp_path)
        assert results.load(tmp_path / "run.json") == run

    def test_ops(self, fake_gpu, tmp_path):
        run, _ = run_driver(tmp_path, ops=["gemm"])
        ops = {(one.peer, one.op) for one in run.cases[0].measurements}
        assert ops == {("liquidgemm", "gemm"), ("bf16", "both"), ("int8", "gemm")}

    def test_a_failing_peer_does_not_stop_the_run(self, fake_gpu, tmp_path, monkeypatch):
        def crash(self, way, tokens, weight):
            raise RuntimeError("no kernel\nfor this")

        monkeypatch.setattr(Bf16, "call", crash)
        run, said = run_driver(tmp_path)
        bf16 = next(one for one in run.cases[0].measurements if one.peer == "bf16")
        assert (bf16.status, bf16.reason) == ("failed", "RuntimeError: no kernel for this")
        assert bf16.time is None
        assert "no kernel for this" in said
        assert not run.partial
        assert run.cases[0].best("liquidgemm", "gemm") is not None

    def test_a_wrong_result_has_no_time(self, fake_gpu, tmp_path, monkeypatch):
        right = Liquid.call
        monkeypatch.setattr(Liquid, "call", lambda *arguments: right(*arguments) * 2)
        run, _ = run_driver(tmp_path)
        ours = run.cases[0].measurements[0]
        assert ours.status == "failed"
        assert "values are wrong" in ours.reason

    def test_a_weight_that_cannot_be_loaded(self, fake_gpu, tmp_path, monkeypatch):
        def refuse(self, weight):
            raise Unsupported("not this shape")

        monkeypatch.setattr(Int8, "__init__", refuse)
        run, _ = run_driver(tmp_path)
        int8 = run.cases[1].measurements[-1]
        assert (int8.status, int8.reason) == ("unsupported", "not this shape")

    def test_absent_peers_are_listed(self, fake_gpu, tmp_path, monkeypatch):
        monkeypatch.setattr(Int8, "why_absent", classmethod(lambda cls: "not here"))
        run, said = run_driver(tmp_path)
        assert run.peers["int8"]["absent"] == "not here"
        assert "int8: absent: not here" in said

    def test_an_interruption_keeps_what_there_is(self, fake_gpu, tmp_path, monkeypatch):
        interleave = timing.interleave

        def interrupt(*arguments):
            if (tmp_path / "run.json").exists():
                raise KeyboardInterrupt
            return interleave(*arguments)

        monkeypatch.setattr(timing, "interleave", interrupt)
        run_driver(tmp_path)
        kept = results.load(tmp_path / "run.json")
        assert kept.partial
        assert kept.problem == "interrupted"
        assert len(kept.cases) == 1

    def test_bursts(self, fake_gpu, tmp_path, monkeypatch):
        slept = []
        monkeypatch.setattr(timing.time, "sleep", slept.append)
        run, _ = run_driver(tmp_path, rest_ms=20)
        samples = sum(
            one.time.rounds for case in run.cases for one in case.measurements if one.time
        )
        assert set(slept) == {0.02}
        assert len(slept) > samples  # the warm-up, too
        assert run.protocol["rest_ms"] == 20
        assert "idles for 20 ms" in tables.markdown(run)
        slept.clear()
        run, _ = run_driver(tmp_path)
        assert not slept
        assert "idles" not in tables.markdown(run)

    def test_a_lost_gpu_ends_the_run(self, fake_gpu, tmp_path, monkeypatch):
        def lost(*arguments):
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(timing, "interleave", lost)
        run, _ = run_driver(tmp_path)
        assert run.partial
        assert "illegal memory access" in run.problem


class TestRecords:
    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 0}', '{"schema": 1}'])
    def test_other_files_are_refused(self, tmp_path, text):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(results.BadResults, match=r"x\.json"):
            results.load(path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(results.BadResults, match="No such file"):
            results.load(tmp_path / "none.json")

    def test_json_has_no_surprises(self, fake_gpu, tmp_path):
        run_driver(tmp_path, tokens=[1])
        data = json.loads((tmp_path / "run.json").read_text())
        assert data["schema"] == 1
        assert data["protocol"]["ops"] == ["gemm", "linear"]


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


class TestCommand:
    def test_every_command_says_what_it_takes(self, capsys):
        for name in command.COMMANDS:
            with pytest.raises(SystemExit) as ended:
                command.main([name, "--help"])
            assert ended.value.code == 0
            assert "usage:" in capsys.readouterr().out

    def test_an_unknown_command_is_refused(self, capsys):
        assert command.main(["gem"]) == 2
        assert "no command 'gem'" in capsys.readouterr().err
