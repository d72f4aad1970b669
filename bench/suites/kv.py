"""Decode attention over a KV cache: by format, batch and context, beside what its bytes take.

    python -m bench kv --json kv.json
    python -m bench kv --formats int8 int4 --context 1024 --batch 1,16,64,256 --json kv.json

Each call is one layer's attention for one new token of every sequence. Its floor is measured in the
same turns: a kernel that reads as many bytes as the call has to (codes, scales, queries) and does
nothing else, from as cold a cache. Beside it stand torch's SDPA and FlexAttention over bfloat16.
Results are checked against float64 before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidgemm.kv import KVCache
from liquidgemm.kv.format import FORMATS

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_tokens
from ..core.timing import capture_rotation, copies_for_cold_l2, interleave, summarize

TOLERANCE = {"fp8": 0.1}  # of the largest value of a head; fp8 rounds queries to 4 bits
WITHIN = 0.02
TORCH = ("SDPA", "FlexAttention")


@dataclass(frozen=True)
class Size:
    """One layer's attention: sequences, tokens of each, and heads."""

    batch: int
    context: int
    heads: int
    group: int
    head_dim: int

    def bytes_of(self, name: str) -> int:
        """What a call has to move: keys, values, parameters, queries and outputs."""
        cache = self.batch * self.heads * self.context
        rows = 2 * self.batch * self.heads * self.group * self.head_dim
        return int(cache * FORMATS[name].bytes_per_token(self.head_dim)) + 2 * rows


@dataclass
class Candidate:
    """A way to compute it: one call per copy of the cache, all of the same result."""

    label: str
    name: str
    calls: list[Callable[[], Tensor]]


def random_cache(size: Size, name: str, seed: int) -> tuple[KVCache, Tensor]:
    """Random keys and values; one token more fits, as while decoding."""
    generator = torch.Generator("cuda").manual_seed(seed)
    cache = KVCache.allocate(name, size.batch, size.heads, size.context + 64, size.head_dim, "cuda")
    lengths = torch.full((size.batch,), size.context, dtype=torch.int32, device="cuda")
    shape = (size.batch, size.context, size.heads, size.head_dim)
    k, v = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    cache.write_(k, v, lengths)
    return cache, lengths


Rows = Callable[[int], tuple[Tensor, Tensor]]


def rows_of(cache: KVCache, context: int) -> Rows:
    """What gives the keys and values of one sequence, ``[H, T, D]``."""

    def rows(b: int) -> tuple[Tensor, Tensor]:
        one = KVCache(*(None if x is None else x[b : b + 1] for x in cache.tensors))
        k, v = (x[0, :, :context] for x in one.read())
        return k, v

    return rows


def error_of(out: Tensor, q: Tensor, rows: Rows) -> float:
    """The largest error of a head relative to its largest value, in the first and last sequence."""
    worst = 0.0
    for b in (0, q.shape[0] - 1):
        k, v = (x.double() for x in rows(b))
        queries = q[b, 0].double().view(k.shape[0], -1, k.shape[-1])
        p = (queries @ k.transpose(1, 2) * k.shape[-1] ** -0.5).softmax(-1)
        expected = p @ v
        error = (out[b, 0].double().view_as(expected) - expected).abs().amax(-1)
        worst = max(worst, (error / expected.abs().amax(-1)).max().item())
    return worst


def torch_calls(q: Tensor, pairs: list, names: list[str]) -> dict[str, list[Callable[[], Tensor]]]:
    """SDPA and FlexAttention over bfloat16 keys and values of exactly this context."""
    from torch.nn.attention.flex_attention import flex_attention

    rows = q.transpose(1, 2)
    flex = torch.compile(flex_attention, dynamic=False)

    def by_sdpa(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rows, k, v, enable_gqa=True).transpose(1, 2)

    def by_flex(k: Tensor, v: Tensor) -> Tensor:
        return flex(rows, k, v, enable_gqa=True).transpose(1, 2)

    calls = {"SDPA": by_sdpa, "FlexAttention": by_flex}
    return {name: [functools.partial(calls[name], k, v) for k, v in pairs] for name in names}


def read_calls(size: int, copies: int) -> list[Callable[[], Tensor]]:
    """Calls that read so many bytes, each its own."""
    import triton

    from . import kv_read

    words = -(-size // 4)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    buffers = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(copies)]

    def call(buffer: Tensor) -> Tensor:
        kv_read.read_kernel[(triton.cdiv(words, kv_read.TILE),)](buffer, out, words, num_warps=4)
        return out

    return [functools.partial(call, buffer) for buffer in buffers]


def right(way: Candidate, q: Tensor, rows: Rows) -> bool:
    """Whether its result is near that of float64; says why not."""
    try:
        error = error_of(way.calls[0](), q, rows)
    except Exception as problem:
        print(f"  {way.label}: {type(problem).__name__}: {problem}", flush=True)
        return False
    if not error <= TOLERANCE.get(way.name, WITHIN):
        print(f"  {way.label}: wrong by {error:.3f}", flush=True)
        return False
    return True


def candidates(size: Size, options: argparse.Namespace, l2: int) -> list[Candidate]:
    shape = (size.batch, 1, size.heads * size.group, size.head_dim)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    found = []
    for name in options.formats:
        copies = copies_for_cold_l2(size.bytes_of(name), l2)
        caches = [random_cache(size, name, seed) for seed in range(copies)]
        calls = [functools.partial(cache.attention, q, lengths) for cache, lengths in caches]
        way = Candidate(name, name, calls)
        if right(way, q, rows_of(caches[0][0], size.context)):
            found.append(way)
        found.append(Candidate(f"read {name}", name, read_calls(size.bytes_of(name), copies)))
        x = torch.randn(size.batch, 1, size.heads, size.head_dim, device="cuda").bfloat16()
        writes = [functools.partial(c.write_, x, x, lengths) for c, lengths in caches]
        found.append(Candidate(f"write {name}", name, writes))
    if options.against:
        copies = copies_for_cold_l2(size.bytes_of("bfloat16"), l2)
        shape = (2, size.batch, size.heads, size.context, size.head_dim)
        pairs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for label, calls in torch_calls(q, pairs, options.against).items():
            way = Candidate(label, "bfloat16", calls)
            if right(way, q, lambda b: tuple(pairs[0][:, b])):
                found.append(way)
        if "bfloat16" not in options.formats:
            calls = read_calls(size.bytes_of("bfloat16"), copies)
            found.append(Candidate("read bfloat16", "bfloat16", calls))
    return found


def measure(size: Size, options: argparse.Namespace, l2: int) -> list[dict]:
    print(f"\n{size}", flush=True)
    ways = candidates(size, options, l2)
    graphs = [capture_rotation(way.calls) for way in ways]
    times = interleave(graphs, options.seconds * len(ways))
    rows = []
    for way, graph, samples in zip(ways, graphs, times, strict=True):
        summary = summarize(samples, graph.calls, len(way.calls))
        rows.append(
            asdict(size)
            | {"label": way.label, "format": way.name}
            | {"bytes": size.bytes_of(way.name), "time": summary.as_dict()}
        )
        graph.release()
    floors = {row["format"]: row for row in rows if row["label"].startswith("read ")}
    for row in sorted(rows, key=lambda row: (row["format"], row["time"]["median_us"])):
        us, floor = row["time"]["median_us"], floors[row["format"]]["time"]["median_us"]
        row["of_read"] = us / floor
        print(
            f"  {row['label']:20} {us:8.2f} us  {row['bytes'] / us / 1e6:5.2f} TB/s  "
            f"{row['of_read']:5.2f} x read",
            flush=True,
        )
    return rows


def markdown(record: dict) -> str:
    """A table: a row per size, µs and the multiple of the time to read the same bytes."""
    found = {row["label"] for row in record["rows"]}
    labels = [name for name in (*FORMATS, *TORCH) if name in found]
    lines = [
        f"{record['machine']['gpu']}, commit {record['commit']}; µs per call (times what reading "
        "the same bytes takes); `bench kv`",
        "",
        "| sequences | context | " + " | ".join(labels) + " |",
        "|---:|---:|" + "---:|" * len(labels),
    ]
    cells: dict[tuple, dict] = {}
    for row in record["rows"]:
        place = (row["batch"], row["context"])
        cells.setdefault(place, {})[row["label"]] = (
            f"{row['time']['median_us']:.1f} ({row['of_read']:.2f})"
        )
    for (batch, context), found in cells.items():
        values = " | ".join(found.get(label, "") for label in labels)
        lines.append(f"| {batch} | {context} | {values} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench kv", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", type=Path, help="where the times go")
    parser.add_argument("--batch", type=argument(parse_tokens), default="1,16,64,256")
    parser.add_argument("--context", type=argument(parse_tokens), default="1024,4096")
    parser.add_argument("--heads", type=int, default=8, help="of keys (default 8)")
    parser.add_argument("--group", type=int, default=4, help="query heads of each (default 4)")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--against", nargs="*", choices=TORCH, default=list(TORCH), help="torch's, over bfloat16"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each (default 0.2)")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    require_gpu(parser)
    if "float16" in options.formats and len(options.formats) > 1:
        options.formats = [name for name in options.formats if name != "float16"]

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    record = {
        "commit": options.commit or machine.commit(),
        "started": machine.now(),
        "command": machine.command_line("kv", words),
        "machine": machine.describe(torch.device("cuda", torch.cuda.current_device())),
        "peak_bytes_per_us": machine.memory_bytes_per_us(properties),
        "rows": [],
    }
    memory = properties.total_memory * 0.8
    with torch.cuda.stream(torch.cuda.Stream()):
        for context in options.context:
            for batch in options.batch:
                size = Size(batch, context, options.heads, options.group, options.head_dim)
                copies = {
                    name: copies_for_cold_l2(size.bytes_of(name), properties.L2_cache_size)
                    for name in {*options.formats, *(["bfloat16"] if options.against else [])}
                }
                # Twice: the bytes that are read for the floor; more while a cache is made.
                needed = sum(3 * n * size.bytes_of(name) for name, n in copies.items())
                if needed > memory:
                    print(f"\n{size}: needs {needed / 1e9:.0f} GB, left out", flush=True)
                    continue
                record["rows"] += measure(size, options, properties.L2_cache_size)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                if options.json:
                    machine.save_json(options.json, record)
    print("\n" + markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
