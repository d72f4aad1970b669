"""The C++ microbenchmarks and the ablation without a GPU: building, tables, claims, cost model."""

import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from repository import DATA

import setup as build
from bench.core import machine, programs, results, roofline, shapes
from bench.peers import PEERS, Unsupported
from bench.peers.base import check_result
from bench.report import write as report
from bench.suites import ablation, counters, micro, sustained

CPP = Path(programs.SOURCES)
GPU = {
    "gpu": "Made-up GPU",
    "sms": 132,
    "driver": None,
    "packages": {},
}
LAYERS = sorted({(n, k) for model in ablation.ABLATED for _, n, k in shapes.MODELS[model]})
SPEEDUPS = {"baseline": 1.0, "lqq": 1.25, "excp": 1.0, "imfp": 1.6}
MICROBENCHMARKS = {
    "stream_floor": [{"N": 64, "pdl_TBps": 2.0}, {"N": 128, "pdl_TBps": 4.0}],
    "mma_rate": [
        {"operand": "s8", "tokens": 128, "sustained_tops": None},
        {"operand": "s8", "tokens": 256, "sustained_tops": 1600.0},
        {"operand": "registers", "tokens": 256, "sustained_tops": 1900.0},
    ],
    "dequant_cost": [{"scheme": "u8", "weights_TBps": 12.0}, {"scheme": "s8", "weights_TBps": 8.0}],
}


def record(**tables) -> programs.Record:
    return programs.Record("python -m bench.x", "0123456789ab", "2000-01-01T00:00", GPU, tables)


def ablation_rows() -> list[programs.Row]:
    return [
        {"N": n, "K": k, "M": m, "variant": name, "us": n * k / 1e6 / speedup}
        for n, k in LAYERS
        for m in (4, 64)
        for name, speedup in SPEEDUPS.items()
    ]


def fake_program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class TestSources:
    @pytest.mark.parametrize("name", ["lds_rate", "gemm"])
    def test_compiles(self, name, tmp_path):
        """One program by itself, and the one that uses the library's API."""
        tools = build.Toolchain.find()
        command = [
            *(str(tools.nvcc), f"-ccbin={tools.cxx}", "-std=c++20", "-O1", "-DNDEBUG", "-c"),
            *("-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"),
            *(*tools.includes(build.ROOT), "-o", str(tmp_path / "x.o"), str(CPP / f"{name}.cu")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_each_states_its_question(self):
        sources = sorted(CPP.glob("*.cu"))
        assert {source.stem for source in sources} == {*micro.TITLES, ablation.NAME}
        for source in sources:
            head = source.read_text().split("#include", maxsplit=1)[0]
            for part in (
                "// Question: ",
                "// What counts: ",
                "// Checked",
                "// Build: ",
                "// Run:",
            ):
                assert part in head, (source.name, part)
            assert f"{source.stem}" in (CPP / "CMakeLists.txt").read_text()


class TestPrograms:
    def test_parse(self):
        text = "# a GPU\nname\tus\tcount\nx\t2.50\t3\ny\t-\t4\n"
        expected = [{"name": "x", "us": 2.5, "count": 3}, {"name": "y", "us": None, "count": 4}]
        assert programs.parse(text) == expected
        assert programs.parse("") == []

    def test_what_went_wrong_is_told(self, tmp_path):
        rows, problem = programs.run(tmp_path / "none", [])
        assert rows == []
        assert "none has not been built: python -m bench micro" in problem
        failing = fake_program(
            tmp_path, "failing", "printf 'a\\tb\\n1\\t2\\n'; echo no >&2; exit 1"
        )
        assert programs.run(failing, []) == ([{"a": 1, "b": 2}], "no")
        silent = fake_program(tmp_path, "silent", "exit 3")
        assert programs.run(silent, []) == ([], "silent exited with 3")

    def test_a_program_that_hangs_keeps_its_rows(self, tmp_path):
        hanging = fake_program(tmp_path, "hanging", "printf 'a\\n1\\n2'; exec sleep 60")
        rows, problem = programs.run(hanging, [], timeout=0.5)
        assert rows == [{"a": 1}]  # the last line was not finished
        assert problem == "hanging took more than 0.5 s"

    def test_file(self, tmp_path):
        one = record(x=[{"a": 1, "b": None}])
        one.save(tmp_path / "new/x.json")
        assert programs.load(tmp_path / "new/x.json") == one
        for text in ("", "[]", "{}", '{"schema": 1}', '{"schema": 1, "tables": {}}'):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(results.BadResults, match=r"bad\.json"):
                programs.load(tmp_path / "bad.json")

    def test_a_build_that_fails_says_how(self, tmp_path, monkeypatch):
        fake_program(tmp_path, "cmake", "echo one; echo the last line >&2; exit 1")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        with pytest.raises(programs.ProgramError, match="the last line"):
            programs.build(["gemm"], tmp_path / "build")

    def test_microbenchmarks_run_in_turn(self, tmp_path, capsys):
        fake_program(tmp_path, "lds_rate", "printf 'pattern\\tclk\\ncodes\\t16.5\\n'")
        fake_program(tmp_path, "gemm", 'printf "shape\\n$1\\n"; exit 1')
        options = micro.make_parser().parse_args(
            ["--folder", str(tmp_path), "--no-build", "--json", str(tmp_path / "out.json")]
        )
        one = record()
        jobs = {name: micro.arguments_of(name) for name in ("lds_rate", "gemm")}
        micro.build_and_run(one, jobs, options)
        kept = programs.load(tmp_path / "out.json")
        assert kept.tables == {
            "lds_rate": [{"pattern": "codes", "clk": 16.5}],
            "gemm": [{"shape": "4096x4096"}],
        }
        assert kept.problems == {"gemm": "gemm exited with 1"}
        said = capsys.readouterr().out
        assert "codes  16.5" in said
        text = micro.markdown(kept)
        assert "**Not complete**: gemm exited with 1" in text
        assert "| codes | 16.5 |" in text

    @pytest.mark.parametrize("module", [micro, ablation])
    def test_without_a_hopper_gpu(self, module, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            module.main([])
        assert "needs a Hopper GPU" in capsys.readouterr().err
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an A100")
        with pytest.raises(SystemExit):
            module.main([])
        assert "an A100 has 8.0" in capsys.readouterr().err

    def test_unknown_names(self, capsys):
        with pytest.raises(SystemExit):
            micro.main(["--only", "speed"])
        assert "'speed' is none of stream_floor" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            ablation.main(["--shapes", "llama4"])
        assert "'llama4' is neither NxK nor one of" in capsys.readouterr().err


class TestAblation:
    def test_speedups_of_a_model(self):
        found = ablation.points(ablation.times(record(ablation=ablation_rows())))
        assert [(p.model, p.m) for p in found[:3]] == [
            ("llama2-7b", 4),
            ("llama2-7b", 64),
            ("llama2-13b", 4),
        ]
        layers = shapes.MODELS["llama2-7b"]
        assert found[0].us["baseline"] == pytest.approx(sum(n * k for _, n, k in layers) / 1e6)
        for name, speedup in SPEEDUPS.items():
            assert found[0].speedup(name) == pytest.approx(speedup)

    def test_incomplete_cases_do_not_count(self):
        rows = ablation_rows()[:-1]  # a variant of one case is missing
        cases = ablation.times(record(ablation=rows))
        assert len(cases) == 2 * len(LAYERS) - 1
        last = rows[-1]
        assert (last["N"], last["K"], last["M"]) not in cases
        with pytest.raises(results.BadResults, match="no complete case"):
            ablation.times(record(ablation=rows[:2]))

    def test_claims_are_held_against_the_times(self):
        text = ablation.markdown(record(ablation=ablation_rows()))
        cases = 2 * len(LAYERS)
        assert "up to 1.29x over the baseline | 1.25x to 1.25x" in text
        assert f"faster in 0 of {len(LAYERS)} cases" in text  # ExCP, small batches
        assert f"over lqq faster in {cases} of {cases} cases: 1.28x" in text
        assert "| 57344 x 8192 | 64 | 469.76 | 1.25x | 1.00x | 1.60x |" in text

    def test_problems_are_told(self):
        one = record(ablation=ablation_rows())
        one.problems["ablation"] = "took too long"
        assert "**Not complete**: took too long" in ablation.markdown(one)


class TestCostModel:
    def test_ceilings_come_from_the_microbenchmarks(self):
        measured = roofline.from_microbenchmarks(record(**MICROBENCHMARKS))
        assert measured.bytes_per_us == 4e6
        assert measured.ops_per_us == 1600e6
        assert measured.decoded_bytes_per_us == 8e6
        assert "Made-up GPU" in measured.source
        assert roofline.from_microbenchmarks(record(stream_floor=[])) is None

    def test_terms(self):
        ceilings = roofline.Ceilings("x", 4e6, 1600e6, 8e6)
        loaded = 4096 * 4096 * 4.25 / 8
        one = roofline.roofline(64, 4096, 4096, ceilings)
        assert one.memory_us == pytest.approx(loaded / 4e6)
        assert one.dequantization_us == pytest.approx(loaded / 8e6)
        assert one.mma_us == pytest.approx(2 * 64 * 4096**2 / 1600e6)
        assert (one.us, one.binds) == (one.memory_us, "memory")
        assert one.in_turn_us == pytest.approx(one.dequantization_us + one.mma_us)
        # Twice as many passes beyond the largest tile.
        many = roofline.roofline(512, 4096, 4096, ceilings)
        assert many.dequantization_us == pytest.approx(2 * one.dequantization_us)
        assert many.binds == "mma"

    def test_slow_dequantization_binds(self):
        slow = roofline.Ceilings("x", 4e6, 1600e6, 2e6)
        assert roofline.roofline(1, 64, 64, slow).binds == "dequantization"

    def test_crossover_of_the_paper(self):
        """About 150 tokens on the GPUs of the paper, whose memory is an H100's."""
        assert roofline.crossover_tokens() == pytest.approx(150, rel=0.02)
        faster_memory = roofline.Ceilings("x", 4.4e6, 1750e6)
        assert roofline.crossover_tokens(faster_memory) == pytest.approx(105.6, rel=0.01)

    def test_another_gpu_without_microbenchmarks(self, tmp_path):
        run = results.load(DATA / "bench_run.json")
        found = roofline.ceilings_of(run, tmp_path / "none.json")
        assert found.bytes_per_us == pytest.approx(44564480 / 14.661)  # of its own stream floor
        assert "Made-up GPU" in found.source
        assert "H100" in found.source
        assert found.ops_per_us == pytest.approx(1750e6)
        run.machine["sms"] = 66
        assert roofline.ceilings_of(run).ops_per_us == pytest.approx(875e6)
        run.machine["gpu"] = "NVIDIA H100 80GB HBM3"
        assert roofline.ceilings_of(run) is roofline.H100


class TestFolders:
    @pytest.mark.parametrize(
        ("name", "slug"),
        [
            ("NVIDIA H100 80GB HBM3", "h100-sxm"),
            ("NVIDIA H100 PCIe", "h100-pcie"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA GH200 480GB", "gh200"),
            ("", "unknown"),
        ],
    )
    def test_name_of_a_gpu(self, name, slug):
        assert machine.gpu_slug(name) == slug
        assert machine.results_folder(name, "2000-01-01") == Path(
            f"bench/results/{slug}/2000-01-01"
        )

    def test_newest_results_are_by_date(self, tmp_path):
        assert machine.newest_results(tmp_path) is None
        for folder in ("h100-sxm/2000-01-02", "a/2000-01-03", "h200/2000-01-01"):
            path = tmp_path / "bench/results" / folder / "results.json"
            path.parent.mkdir(parents=True)
            path.touch()
        expected = Path("bench/results/a/2000-01-03/results.json")
        assert machine.newest_results(tmp_path) == expected

    def test_report_of_a_folder(self, tmp_path, capsys):
        """Tables and plots of everything, from JSON alone."""
        pytest.importorskip("matplotlib")
        data = json.loads((DATA / "bench_run.json").read_text())
        (tmp_path / "results.json").write_text(json.dumps(data))
        (tmp_path / "results_other.json").write_text(json.dumps(data))
        record(**MICROBENCHMARKS).save(tmp_path / "microbench.json")
        record(ablation=ablation_rows()).save(tmp_path / "ablation.json")
        state = {"sm_mhz": 1500.0, "power_w": 699.0, "slowed_by": ["power cap"]}
        row = sustained.row_of("fp8 row", 4096, 4096, 4096, [100.0] * 5 + [125.0] * 5, state)
        record(**{"N = 4096": [row]}).save(tmp_path / "sustained.json")
        counted = counters.read_report((DATA / "ncu.csv").read_text())
        record(counters=counted).save(tmp_path / "counters.json")
        assert report.main([str(tmp_path)]) == 0
        written = [Path(line) for line in capsys.readouterr().out.splitlines()]
        assert all(path.stat().st_size > 0 for path in written)
        names = {path.name for path in written}
        assert {"results.md", "microbench.md", "ablation.md", "ablation.png"} <= names
        assert tmp_path / "results_other.md" in written
        assert tmp_path / "plots_other/time_4096x4096.png" in written
        text = (tmp_path / "sustained.md").read_text()
        assert "| fp8 row | 1374.4 | 1099.5 | 1500.0 | 699.0 | - | power cap |" in text
        assert "| 635.8 | 1753.6 | 79.9 |" in (tmp_path / "counters.md").read_text()
        text = (tmp_path / "results.md").read_text()
        assert "4 TB/s, 1600 TOPS, dequantization 8 TB/s; of this Made-up GPU" in text
        assert "| **2.23** / 1.11 / 0.02 |" in text

    def test_counters(self):
        """What Nsight Compute printed of a product of 64 tokens and of one of 4096."""
        text = (DATA / "ncu.csv").read_text()
        few, many = counters.read_report(text)
        assert few["us"] == 53.7
        assert few["stalls"].startswith("long_scoreboard 60, ")
        assert many == {
            "us": 635.8,
            "sm_mhz": 1753.6,
            "tensor": 79.9,
            "issue": 29.4,
            "shared": 51.6,
            "l2": 51.8,
            "dram": 17.4,
            "stalls": "barrier 37, wait 14, selected 13",
        }
        with pytest.raises(counters.NoCounters, match="printed no table: ==ERROR== The user"):
            counters.read_report("==ERROR== The user does not have permission")

    def test_counters_without_the_tool(self, monkeypatch):
        monkeypatch.setattr(counters.shutil, "which", lambda name: None)
        with pytest.raises(counters.NoCounters, match="ncu is not on PATH"):
            counters.measure([(64, 64, 1)])

    def test_products(self):
        assert counters.parse_products("64x128:4,8192x64:16") == [(64, 128, 4), (8192, 64, 16)]

    @pytest.mark.parametrize("text", ["64x64", "64x64:", "64x64:0", "a", "64x64:1:2", ""])
    def test_products_that_are_none(self, text):
        with pytest.raises(ValueError, match="is not NxK:M"):
            counters.parse_products(text)

    def test_report_of_an_empty_folder(self, tmp_path, capsys):
        assert report.main([str(tmp_path)]) == 1
        assert "has none of results*.json" in capsys.readouterr().err


class FakeVllmOps:
    """The arithmetic of vLLM's kernel, from the operands as its ops take them."""

    @staticmethod
    def cutlass_encode_and_reorder_int4b(columns):
        assert columns.dtype == torch.int32
        assert columns.stride(0) == 1  # [K / 8, N], k contiguous
        return columns

    @staticmethod
    def cutlass_pack_scale_fp8(scales):
        assert scales.dtype == torch.float8_e4m3fn
        assert scales.is_contiguous()
        return scales

    @staticmethod
    def cutlass_w4a8_mm(a, b_q, b_group_scales, b_group_size, b_channel_scales, a_token_scales):
        nibbles = torch.stack([b_q >> (4 * i) & 15 for i in range(8)], 1).flatten(0, 1)  # [K, N]
        codes = (nibbles ^ 8) - 8  # as signed
        steps = b_group_scales.float().repeat_interleave(b_group_size, 0)
        weight = (codes * steps).to(torch.float8_e4m3fn).float()
        scales = a_token_scales.unsqueeze(1) * b_channel_scales
        return (a.float() @ weight * scales).to(torch.bfloat16)


def test_vllm_adapter_quantizes_well(monkeypatch):
    """Its operands, through the documented arithmetic, are close to the bf16 product."""
    package = types.ModuleType("vllm")
    package._custom_ops = FakeVllmOps
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", FakeVllmOps)
    torch.manual_seed(0)
    weight = torch.randn(128, 256, dtype=torch.bfloat16)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    peer = PEERS["vllm"](weight)
    way = peer.ways[0]
    tokens = peer.tokens(way, x)
    out = peer.call(way, tokens, peer.new_copy())
    assert check_result(peer, way, tokens, out, torch.arange(5)) < 0.005
    wanted = x.float() @ weight.float().T
    assert (out - wanted).norm() / wanted.norm() < 0.15  # 4 bits without zero points
    with pytest.raises(Unsupported, match="multiples of 128"):
        PEERS["vllm"](torch.randn(64, 256, dtype=torch.bfloat16))


def test_vllm_of_another_torch_is_absent(monkeypatch):
    package = types.ModuleType("vllm")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", package)
    assert "vllm cannot be imported: cannot import name" in PEERS["vllm"].why_absent()
