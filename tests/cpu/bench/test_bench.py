"""The benchmark without a GPU: arguments, statistics, the machine, peers and the command."""

import pytest
import torch
from reference import exact_int_mm

from bench import __main__ as command
from bench.core import machine, roofline, shapes, stream_floor, timing
from bench.peers import PEERS, parse_peers
from bench.peers.base import WrongResult, check_result, exact_product, poison, sample_rows
from bench.peers.liquid import Liquid
from bench.peers.native import Bf16, Int8
from bench.suites.gemm import main


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

    def test_poison_is_noticed_outside_the_sampled_rows(self, monkeypatch):
        monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
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
