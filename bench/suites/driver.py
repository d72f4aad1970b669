"""Measures every peer on every shape and batch size; docs/benchmarks.md describes the protocol."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liquidgemm.cli._timing import CallGraph, capture

from ..core import machine, stream_floor, timing
from ..core.results import Case, Measurement, Run
from ..core.shapes import Shape
from ..peers import PEERS, Peer, Unsupported
from ..peers.base import Way, check_result, poison, sample_rows

MAX_CASE_SECONDS = 3.0  # of timing; longer changes nothing
EXACT_ROWS, SAMPLED_ROWS = 1024, 64  # verified against the reference, at most


def print_line(text: str) -> None:
    print(text, flush=True)


class DeviceLost(Exception):
    """The CUDA context is unusable; nothing more can be measured in this process."""


@dataclass
class Options:
    """What to measure. `seconds` is a budget for the whole run, `commit` overrides git."""

    shapes: list[Shape]
    tokens: list[int]
    peers: list[str]
    ops: list[str]
    seconds: float
    json: Path | None
    floor_program: Path
    command: str
    commit: str | None = None
    rest_ms: float = 0.0  # of an idle GPU before each sample
    say: Callable[[str], None] = print_line


@dataclass
class Loaded:
    """A peer with one weight and its copies, or the reason why it has none."""

    name: str
    ways: tuple[Way, ...]
    peer: Peer | None = None
    copies: list = field(default_factory=list)
    status: str = "ok"
    reason: str = ""


@dataclass
class Entry:
    """One way of calling one peer at one size, on its way to a measurement."""

    loaded: Loaded
    way: Way
    result: Measurement
    tokens: Any = None
    calls: list[Callable[[], Tensor]] = field(default_factory=list)
    graph: CallGraph | None = None

    def fail(self, error: Exception) -> None:
        """Records why there will be no time; raises DeviceLost if there can be no other either."""
        self.result.status = "unsupported" if isinstance(error, Unsupported) else "failed"
        self.result.reason = first_line(error)
        self.result.time = None
        raise_if_lost(self.loaded.name, error)
        self.release()

    def release(self) -> None:
        self.calls, self.tokens = [], None
        if self.graph is not None:
            graph, self.graph = self.graph, None
            graph.release()


def raise_if_lost(name: str, error: Exception) -> None:
    """Raises DeviceLost if what failed left the GPU in an error state: nothing else will run."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as fatal:
        raise DeviceLost(f"{name}: {first_line(fatal)}") from error


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Unsupported):
        return text
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def protocol() -> dict:
    return {
        "data": "weights and activations N(0, 1) in bf16, quantized by each peer in its own way",
        "cache": f"weights cold: copies that add up to {timing.COLD_FACTOR}x the L2 cache or more, "
        "visited in turn; activations as the previous call left them",
        "graph_us": timing.GRAPH_US,
        "order": "replays of all peers in turn; time of a call = time of a replay / its calls",
        "verified": f"after timing, output poisoned: at most {EXACT_ROWS} rows bit for bit, or "
        f"{SAMPLED_ROWS} rows within the peer's tolerance",
    }


class Driver:
    """One run. `record` is complete up to the last finished case at any time."""

    def __init__(self, options: Options, device: torch.device | None = None) -> None:
        self.options = options
        self.say = options.say
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.record = Run(
            command=options.command,
            commit=options.commit or machine.commit(),
            started=machine.now(),
            machine=machine.describe(self.device),
            protocol=protocol()
            | {"seconds": options.seconds, "ops": options.ops, "rest_ms": options.rest_ms},
            shapes=[{"n": s.n, "k": s.k, "labels": list(s.labels)} for s in options.shapes],
        )
        self.present: list[type[Peer]] = []
        self.start = time.perf_counter()
        self.cases_left = len(options.shapes) * len(options.tokens)
        self.overhead: list[float] = []  # seconds per finished case beside its timing

    def run(self) -> Run:
        """Measures everything; on an interruption, what there is stays in the file, as partial."""
        try:
            self._run()
            self.record.partial = False
        except DeviceLost as error:
            self.record.problem = f"stopped, the GPU is in an error state: {error}"
            self.say(self.record.problem)
        except KeyboardInterrupt:
            self.record.problem = "interrupted"
            self.say("interrupted: the results so far are kept, marked partial")
        finally:
            self.record.finished = machine.now()
            self._save()
        return self.record

    def _run(self) -> None:
        self._find_peers()
        self._snapshot("before")
        record = self.record
        record.floors, record.floor_problem = stream_floor.measure(
            self.options.floor_program, self.options.shapes
        )
        self.say(f"stream floor: {record.floor_problem or 'measured'}")
        stream = torch.cuda.Stream()  # graphs cannot be captured on the default stream
        with torch.no_grad(), torch.cuda.stream(stream):
            for shape in self.options.shapes:
                self._measure_shape(shape)
        self._snapshot("after")

    def _find_peers(self) -> None:
        for name in self.options.peers:
            peer = PEERS[name]
            absent = peer.why_absent()
            self.record.peers[name] = {
                "version": None if absent else peer.version(),
                "absent": absent,
                "what": " ".join((peer.__doc__ or "").split()),
            }
            if absent:
                self.say(f"{name}: absent: {absent}")
            else:
                self.present.append(peer)

    def _measure_shape(self, shape: Shape) -> None:
        generator = torch.Generator(self.device).manual_seed(shape.n * 131071 + shape.k)
        weight = torch.empty(shape.n, shape.k, dtype=torch.bfloat16, device=self.device)
        weight.normal_(generator=generator)
        peers = [self._load(peer, weight) for peer in self.present]
        del weight
        for m in self.options.tokens:
            x = torch.empty(m, shape.k, dtype=torch.bfloat16, device=self.device)
            x.normal_(generator=generator)
            began = time.perf_counter()
            seconds = self._case_seconds(began)
            snapshot = None
            if m == self.options.tokens[-1]:
                snapshot = functools.partial(self._snapshot, f"{shape} M={m}, under load")
            case = self._measure_case(Case(shape.n, shape.k, m), x, peers, seconds, snapshot)
            self.overhead.append(max(0.0, time.perf_counter() - began - seconds))
            self.record.cases.append(case)
            self.cases_left -= 1
            self._save()
            self.say(self._progress(case))
            torch.cuda.empty_cache()  # else the outputs of all graphs so far add up

    def _load(self, cls: type[Peer], weight: Tensor) -> Loaded:
        ways = tuple(way for way in cls.ways if any(map(way.serves, self.options.ops)))
        loaded = Loaded(cls.name, ways)
        try:
            loaded.peer = cls(weight)
            count = timing.copies_for_cold_l2(loaded.peer.weight_bytes(), self.l2_bytes)
            loaded.copies = [loaded.peer.new_copy() for _ in range(count)]
            torch.cuda.synchronize()
        except Exception as error:
            loaded.peer, loaded.copies = None, []
            loaded.status = "unsupported" if isinstance(error, Unsupported) else "failed"
            loaded.reason = first_line(error)
            raise_if_lost(cls.name, error)
        return loaded

    def _measure_case(
        self,
        case: Case,
        x: Tensor,
        peers: list[Loaded],
        seconds: float,
        snapshot: Callable[[], None] | None,
    ) -> Case:
        entries = [self._prepare(loaded, way, x) for loaded in peers for way in loaded.ways]
        case.measurements = [entry.result for entry in entries]
        ready = [entry for entry in entries if entry.graph is not None]
        try:
            if ready:
                samples = self._time([entry.graph for entry in ready], seconds, snapshot)
                for entry, times in zip(ready, samples, strict=True):
                    self._finish(entry, times, x)
        except KeyboardInterrupt:
            torch.cuda.synchronize()  # replays may be in flight
            raise
        finally:
            for entry in entries:
                with suppress(RuntimeError):  # a lost device says so elsewhere
                    entry.release()
        return case

    def _prepare(self, loaded: Loaded, way: Way, x: Tensor) -> Entry:
        """Checks the numerics of one call, then captures the calls that will be timed."""
        result = Measurement(loaded.name, way.op, way.variant, loaded.status, loaded.reason)
        entry = Entry(loaded, way, result)
        peer = loaded.peer
        if peer is None:
            return entry
        try:
            if len(x) < peer.min_tokens:
                raise Unsupported(f"needs at least {peer.min_tokens} tokens")
            result.detail = peer.describe(way, len(x))
            entry.tokens = peer.tokens(way, x)
            entry.calls = [
                functools.partial(peer.call, way, entry.tokens, copy) for copy in loaded.copies
            ]
            rows = sample_rows(len(x), SAMPLED_ROWS, self.device)
            check_result(peer, way, entry.tokens, entry.calls[0](), rows)
            entry.graph = timing.capture_rotation(entry.calls)
            self._require_cold(entry)
        except Exception as error:
            entry.fail(error)
        return entry

    def _require_cold(self, entry: Entry) -> None:
        loaded, graph = entry.loaded, entry.graph
        rotated = len(loaded.copies) * loaded.peer.weight_bytes()
        if rotated < timing.COLD_FACTOR * self.l2_bytes:
            raise RuntimeError(f"{rotated} bytes of weights are too few for a cold L2 cache")
        if graph.calls % len(loaded.copies) or graph.calls == 0:
            raise RuntimeError(f"{graph.calls} calls do not visit all {len(loaded.copies)} copies")

    def _time(
        self, graphs: list[CallGraph], seconds: float, snapshot: Callable[[], None] | None
    ) -> list[list[float]]:
        try:
            return timing.interleave(graphs, seconds, snapshot, self.options.rest_ms / 1e3)
        except RuntimeError as error:  # asynchronous: whose fault it is cannot be told
            raise DeviceLost(first_line(error)) from error

    def _finish(self, entry: Entry, times: list[float], x: Tensor) -> None:
        """Verifies what the timed graph writes, and a call alone: in the graph, calls overwrite
        each other's output, so that one could hide what the last one leaves out.
        """
        peer, result, graph = entry.loaded.peer, entry.result, entry.graph
        at_most = EXACT_ROWS if peer.tolerance == 0 else SAMPLED_ROWS
        rows = sample_rows(len(x), at_most, self.device)
        try:
            result.error = self._verify(entry, graph, rows)
            single = capture(entry.calls[-1:], 1)
            try:
                self._verify(entry, single, rows)
            finally:
                single.release()
            result.time = timing.summarize(times, graph.calls, len(entry.loaded.copies))
        except Exception as error:
            entry.fail(error)
        else:
            entry.release()

    def _verify(self, entry: Entry, graph: CallGraph, rows: Tensor) -> float:
        poison(graph.last)
        graph.graph.replay()
        return check_result(entry.loaded.peer, entry.way, entry.tokens, graph.last, rows)

    def _case_seconds(self, now: float) -> float:
        """An equal share of what is left of the budget, less what a case takes beside timing."""
        left = self.options.seconds - (now - self.start)
        overhead = sum(self.overhead) / len(self.overhead) if self.overhead else 0.0
        return max(0.02, min(MAX_CASE_SECONDS, left / max(1, self.cases_left) - overhead))

    def _progress(self, case: Case) -> str:
        done = len(self.record.cases)
        elapsed = time.perf_counter() - self.start
        left = elapsed / done * self.cases_left
        values = "  ".join(
            f"{label(one)} {one.us:.2f}" if one.time else f"{label(one)} {one.status}"
            for one in case.measurements
        )
        problems = "".join(
            f"\n    {label(one)}: {one.reason}"
            for one in case.measurements
            if one.status == "failed"
        )
        return (
            f"[{done}/{done + self.cases_left}, {left:.0f} s left] "
            f"{case.n}x{case.k} M={case.m} µs: {values}{problems}"
        )

    def _snapshot(self, when: str) -> None:
        self.record.snapshots.append(machine.snapshot(when, self.device))

    def _save(self) -> None:
        if self.options.json is not None:
            self.record.save(self.options.json)


def label(one: Measurement) -> str:
    """Short name of a measurement: "gemm", "linear" for ours, "fp8 row" for a peer."""
    if one.peer == "liquidgemm":
        return one.op
    return " ".join(filter(None, (one.peer, one.variant, one.op if one.op == "linear" else "")))
