"""The driver of the benchmark on a fake GPU, and the records that it writes."""

import contextlib
import json
import types

import pytest
import torch
from reference import exact_int_mm

from bench.core import results, shapes, timing
from bench.peers import Unsupported
from bench.peers.liquid import Liquid
from bench.peers.native import Bf16, Int8
from bench.report import tables
from bench.suites import driver


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
    monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
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
