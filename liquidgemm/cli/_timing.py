"""How this project times a GPU call: in a CUDA graph, its weights not in the L2 cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch


@dataclass
class CallGraph:
    """A number of calls as one CUDA graph.

    Attributes:
        graph: what a replay launches.
        calls: how many calls that is.
        last: what the last call returned. Every replay writes it anew.
    """

    graph: torch.cuda.CUDAGraph
    calls: int
    last: object

    def timed_replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queues one replay and returns the events around it, for `time_us` once they are past.

        Nothing here waits for the GPU. Queue replays ahead of it: on an idle GPU the first event is
        past before the graph has been launched, and the launch counts.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def time_us(self, events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        """Mean time of one call in µs during that replay."""
        start, end = events
        return start.elapsed_time(end) * 1000 / self.calls

    def release(self) -> None:
        """Frees the graph and the memory of its calls; no replay may be in flight."""
        self.last = None
        self.graph.reset()


def capture(calls: Sequence[Callable[[], object]], count: int) -> CallGraph:
    """Captures `count` calls, round and round, on the current stream, not the default one.

    The calls must have run before: what they allocate, load or compile once is no part of a graph.
    """
    # torch.cuda.graph() collects garbage and empties the cache of the allocator each time, which
    # takes far longer than the capture. It is enough that no garbage is collected meanwhile.
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin()
        try:
            for i in range(count):
                last = calls[i % len(calls)]()
        except BaseException:
            with suppress(RuntimeError):  # the call's own error says more
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    return CallGraph(graph, count, last)


def median_time_us(
    calls: Sequence[Callable[[], object]], *, calls_per_graph: int = 64, replays: int = 9
) -> float:
    """Median time of one call in µs on the current device.

    The calls are captured one after the other, round and round, so that the host's launch overhead
    does not count. Give one call per copy of the weights, and copies enough to exceed the L2 cache:
    each call then finds its own copy evicted by the others, as a model's layers do. What the calls
    share (activations, scales) stays warm, as it would be after the layer before.

    Args:
        calls: equivalent calls, each on its own copy of what must come from memory.
        calls_per_graph: how many calls one replay makes, rounded up to whole rounds.
        replays: how many replays the median is taken over; one more warms up.
    """
    rounds = -(-calls_per_graph // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        graph = capture(calls, rounds * len(calls))
        events = [graph.timed_replay() for _ in range(replays + 1)]
        side.synchronize()
        times = [graph.time_us(pair) for pair in events[1:]]
        graph.release()
    return sorted(times)[replays // 2]
