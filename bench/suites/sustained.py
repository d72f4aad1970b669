"""How fast for seconds on end? One large product after the other, at the GPU's limit of power.

    python -m bench sustained --json sustained.json

Each candidate runs for --seconds without a pause, twice, in turn with the others. A row says how
fast it was in the first and in the last fifth of that time, and what clocks and power were then.
Data, weights and checks are those of the benchmark.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..core import machine, programs, timing
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_shapes
from ..peers import OURS, PEERS, parse_peers
from ..peers.base import check_result, poison, sample_rows
from .driver import SAMPLED_ROWS

ROUNDS = 2


def candidates(names: list[str], n: int, k: int, m: int) -> Iterator[tuple[str, object]]:
    """A name and a graph of calls for every way to the product; the output is checked first."""
    device = torch.device("cuda", torch.cuda.current_device())
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    generator = torch.Generator(device).manual_seed(0)
    weight, x = (
        torch.empty(rows, k, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        for rows in (n, m)
    )
    rows = sample_rows(m, SAMPLED_ROWS, device)
    for name in names:
        peer = PEERS[name](weight)
        count = timing.copies_for_cold_l2(peer.weight_bytes(), l2_bytes)
        copies = [peer.new_copy() for _ in range(count)]
        for way in peer.ways:
            if not way.serves("gemm"):
                continue
            tokens = peer.tokens(way, x)
            graph = timing.capture_rotation(
                [lambda p=peer, w=way, t=tokens, c=copy: p.call(w, t, c) for copy in copies]
            )
            poison(graph.last)
            graph.graph.replay()
            check_result(peer, way, tokens, graph.last, rows)
            yield f"{name} {way.variant}".strip(), graph


def run_for(graph, seconds: float) -> tuple[list[float], dict]:
    """Times of one call in µs over so many seconds, and the GPU's state near their end."""
    graph.timed_replay()[1].synchronize()
    events = graph.timed_replay()
    events[1].synchronize()
    one_us = graph.time_us(events) * graph.calls
    replays = max(4, int(seconds * 1e6 / one_us))
    pairs = [graph.timed_replay() for _ in range(replays)]
    pairs[int(0.8 * replays)][1].synchronize()
    state = machine.snapshot("last fifth", torch.device("cuda", torch.cuda.current_device()))
    pairs[-1][1].synchronize()
    return [graph.time_us(pair) for pair in pairs], state


def row_of(name: str, m: int, n: int, k: int, times: list[float], state: dict) -> dict:
    def tops(some: list[float]) -> float:
        return round(2e-6 * m * n * k / statistics.median(some), 1)

    a_fifth = max(1, len(times) // 5)
    slowed = state.get("slowed_by") or []
    return {
        "candidate": name,
        "tops_first": tops(times[:a_fifth]),
        "tops_last": tops(times[-a_fifth:]),
        "sm_mhz": state.get("sm_mhz"),
        "power_w": state.get("power_w"),
        "temperature_c": state.get("temperature_c"),
        "slowed_by": ", ".join(slowed) or "nothing",
    }


def markdown(record: programs.Record) -> str:
    text = (
        "Candidates in turn, each without a pause; tops: 1e12 operations per second, medians of "
        "the first and of the last fifth of the time; clock, power and temperature in the last "
        "fifth."
    )
    parts = [programs.heading(record, "Sustained rate", text), "\n"]
    for shape, rows in record.tables.items():
        parts += [f"\n## {shape}\n\n", "\n".join(programs.markdown_table(rows)), "\n"]
    return "".join(parts)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench sustained", description=__doc__)
    parser.add_argument("--shape", type=argument(parse_shapes), default="8192x8192", help="N x K")
    parser.add_argument("--m", type=int, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--against", type=argument(parse_peers), default="fp8")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    require_gpu(parser)
    record = programs.new_record(machine.command_line("sustained", words), options.commit)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for shape in options.shape:
            n, k = shape.n, shape.k
            rows = record.tables.setdefault(f"N = {n}, K = {k}, M = {options.m}", [])
            graphs = dict(candidates([OURS, *options.against], n, k, options.m))
            for _ in range(ROUNDS):
                for name, graph in graphs.items():
                    rows.append(row_of(name, options.m, n, k, *run_for(graph, options.seconds)))
                    if options.json:
                        record.save(options.json)
            print(programs.text_table(rows), flush=True)
    return 0
