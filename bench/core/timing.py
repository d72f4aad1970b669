"""Interleaved timing of several candidates on cold weights, and its statistics."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from liquidgemm.cli._timing import CallGraph, capture

COLD_FACTOR = 3  # rotating weights add up to at least this many times the L2 cache
GRAPH_US = 1500.0  # a replay takes at least this long, so that its launch does not show
MAX_CALLS = 384
MIN_ROUNDS, MAX_ROUNDS = 9, 400
QUEUED_ROUNDS = 16  # rounds queued before the host waits for the GPU


@dataclass(frozen=True)
class Summary:
    """Times in µs per call over the rounds; each round's value is the mean over one replay.

    Attributes:
        calls: calls per replay.
        copies: copies of the weight that the calls rotate over.
    """

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    rounds: int
    calls: int
    copies: int

    def as_dict(self) -> dict:
        return asdict(self)


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    at = fraction * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarize(times_us: Sequence[float], calls: int, copies: int) -> Summary:
    return Summary(
        median_us=statistics.median(times_us),
        p10_us=percentile(times_us, 0.1),
        p90_us=percentile(times_us, 0.9),
        min_us=min(times_us),
        rounds=len(times_us),
        calls=calls,
        copies=copies,
    )


def copies_for_cold_l2(weight_bytes: int, l2_bytes: int) -> int:
    """How many copies of a weight exceed COLD_FACTOR times the L2 cache; at least 2."""
    return max(2, math.ceil(COLD_FACTOR * l2_bytes / weight_bytes))


def calls_per_graph(copies: int, call_us: float) -> int:
    """Whole rotations over all copies that take about GRAPH_US, if MAX_CALLS allows."""
    wanted = min(MAX_CALLS, GRAPH_US / max(call_us, 0.1))
    return max(1, round(wanted / copies)) * copies


def rounds_in(seconds: float, round_us: float) -> int:
    """How many rounds a budget allows, within MIN_ROUNDS and MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds * 1e6 / max(round_us, 1.0))))


def capture_rotation(calls: Sequence[Callable[[], object]]) -> CallGraph:
    """A graph of suitable length that visits all copies equally often, warmed up.

    Run it on a stream that is not the default one.
    """
    for call in (calls[0], calls[-1]):  # compile, load, allocate
        call()
    probe = capture(calls, len(calls))
    pairs = [probe.timed_replay() for _ in range(2)]
    torch.cuda.current_stream().synchronize()
    call_us = probe.time_us(pairs[-1])
    count = calls_per_graph(len(calls), call_us)
    if count == probe.calls:
        return probe
    probe.release()
    return capture(calls, count)


def interleave(
    graphs: Sequence[CallGraph],
    seconds: float,
    while_busy: Callable[[], None] | None = None,
    rest_seconds: float = 0.0,
) -> list[list[float]]:
    """Times in µs per call of each graph, measured in turn (ABAB...) for about `seconds`.

    A tenth of the time warms up first. `while_busy` is called while replays are queued on the GPU.
    With a rest, the GPU idles for so long before every replay that is timed, which follows one that
    is not: bursts, in which no limit of power acts.
    """
    stream = torch.cuda.current_stream()

    def burst(graph: CallGraph):
        if rest_seconds:
            stream.synchronize()
            time.sleep(rest_seconds)
            graph.graph.replay()
        return graph.timed_replay()

    def run(rounds: int, busy: Callable[[], None] | None = None) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in graphs]
        for first in range(0, rounds, QUEUED_ROUNDS):
            graphs[0].graph.replay()  # leads in: the GPU is busy when the first event is queued
            queued = [
                [burst(graph) for graph in graphs]
                for _ in range(min(QUEUED_ROUNDS, rounds - first))
            ]
            if busy is not None:
                busy()
                busy = None
            stream.synchronize()
            for pairs in queued:
                for samples, graph, pair in zip(times, graphs, pairs, strict=True):
                    samples.append(graph.time_us(pair))
        return times

    start = time.perf_counter()
    run(1)
    round_us = (time.perf_counter() - start) * 1e6
    run(max(1, int(seconds * 1e5 / max(round_us, 1.0))))
    return run(rounds_in(seconds, round_us), while_busy)
