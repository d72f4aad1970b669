"""How this project times a GPU call: in a CUDA graph, its weights not in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


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
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(calls)))
    return sorted(times[1:])[replays // 2]
