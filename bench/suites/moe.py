"""``python -m bench moe``: layers of experts, beside the peers' grouped products.

Per layer, number of tokens and routing, all in one run, interleaved, in CUDA graphs, with weights
that are not in the L2 cache: calls rotate over copies of the layer, each with its own routing.


    pair      both products on rows that are sorted and quantized already
    layer     ours alone: `moe`, from tokens and their routing to their sums
    floor     active experts' bytes at the speed of a copy, or multiplications at the limit of power

With --sweep every plan of the grouped kernel is timed for each product instead. Tables and a plot
are made by moe-report, without a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from liquidgemm.ops.plans import grouped_plan, grouped_plan_names

from ..core import machine, timing
from ..core.experts import (
    LAYERS,
    MEASURED,
    ROUTINGS,
    STREAM_BYTES_PER_US,
    TOKENS,
    Layer,
    Routing,
    floor_us,
    route,
)
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_tokens
from ..peers.experts import EXPERT_PEERS, OURS, ExpertsPeer, LiquidExperts, check, parse_names

SCHEMA = 1
Call = Callable[[], torch.Tensor]


def choices(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


class Candidate:
    """A peer's two products of one layer, and copies of their weights."""

    def __init__(self, cls: type[ExpertsPeer], layer: Layer) -> None:
        self.name = cls.name
        self.peers = [cls(layer.local_experts, n, k) for n, k in layer.products]
        self.copies = [tuple(peer.new_copy() for peer in self.peers)]

    def grow(self, copies: int) -> None:
        while len(self.copies) < copies:
            self.copies.append(tuple(peer.new_copy() for peer in self.peers))

    def inputs(self, layer: Layer, routing: Routing, seed: int) -> tuple:
        generator = torch.Generator("cuda").manual_seed(seed)
        return tuple(
            peer.rows(
                torch.empty(routing.rows, k, dtype=torch.bfloat16, device="cuda").normal_(
                    generator=generator
                ),
                routing,
            )
            for peer, (_, k) in zip(self.peers, layer.products, strict=True)
        )

    def pair(self, copy: tuple, inputs: tuple) -> list[torch.Tensor]:
        return [
            peer.call(weight, rows)
            for peer, weight, rows in zip(self.peers, copy, inputs, strict=True)
        ]

    def check(self, inputs: tuple, routing: Routing) -> float:
        outputs = self.pair(self.copies[0], inputs)
        return max(
            check(peer, rows, out, routing)
            for peer, rows, out in zip(self.peers, inputs, outputs, strict=True)
        )


class Suite:
    def __init__(self, options: argparse.Namespace, command: str) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.options = options
        properties = torch.cuda.get_device_properties(device)
        self.l2_bytes = properties.L2_cache_size
        peak = machine.memory_bytes_per_us(properties)
        slug = machine.gpu_slug(properties.name)
        self.stream_bytes = STREAM_BYTES_PER_US.get(slug, 0.9 * peak)
        self.num_sms, self.memory_tbps = properties.multi_processor_count, peak * 1e-6
        self.record = {
            "schema": SCHEMA,
            "command": command,
            "commit": options.commit or machine.commit(),
            "started": machine.now(),
            "machine": machine.describe(device),
            "stream_bytes_per_us": self.stream_bytes,
            "absent": {},
            "snapshots": [machine.snapshot("before", device)],
            "cases": [],
            "sweep": [],
        }

    def save(self) -> None:
        if self.options.json:
            machine.save_json(self.options.json, self.record)

    def measure(self, layer: Layer) -> None:
        began = time.perf_counter()
        candidates = []
        for name in (OURS, *(() if self.options.sweep else self.options.against)):
            cls = EXPERT_PEERS[name]
            try:
                if reason := cls.why_absent():
                    raise RuntimeError(reason)
                candidates.append(Candidate(cls, layer))
            except Exception as error:
                self.record["absent"][f"{name}, {layer.name}"] = f"{type(error).__name__}: {error}"
                print(f"{name}: {error}", flush=True)
            torch.cuda.empty_cache()
        print(f"{layer.name}: weights after {time.perf_counter() - began:.0f} s", flush=True)
        for kind in self.options.routing:
            for tokens in self.options.tokens:
                (self.sweep_case if self.options.sweep else self.case)(
                    layer, candidates, tokens, kind
                )
                self.save()
        candidates.clear()
        torch.cuda.empty_cache()

    def routings(self, layer: Layer, tokens: int, kind: str) -> list[Routing]:
        """One per copy: together they read several times the L2 cache."""
        active = route(layer, tokens, kind, 0).active
        copies = math.ceil(timing.COLD_FACTOR * self.l2_bytes / (active * layer.expert_bytes()))
        return [route(layer, tokens, kind, seed) for seed in range(max(2, copies))]

    def describe(self, layer: Layer, tokens: int, kind: str, routings: list[Routing]) -> dict:
        floors = [floor_us(layer, routing, self.stream_bytes) for routing in routings]
        return {
            "layer": layer.name,
            "tokens": tokens,
            "routing": kind,
            "rows": sum(r.rows for r in routings) / len(routings),
            "active": sum(r.active for r in routings) / len(routings),
            "most_rows": max(max(r.counts) for r in routings),
            "floor_us": sum(floors) / len(floors),
            "copies": len(routings),
        }

    def plans(self, layer: Layer, rows: int) -> list[str]:
        gpu = {"num_sms": self.num_sms, "memory_tbps": self.memory_tbps}
        return [grouped_plan(rows, layer.local_experts, n, k, **gpu) for n, k in layer.products]

    def case(self, layer: Layer, candidates: list[Candidate], tokens: int, kind: str) -> None:
        routings = self.routings(layer, tokens, kind)
        case = self.describe(layer, tokens, kind, routings)
        case |= {"times": {}, "problems": {}, "plans": self.plans(layer, routings[0].rows)}
        graphs = {}
        for candidate in candidates:
            try:
                candidate.grow(len(routings))
                inputs = [candidate.inputs(layer, r, i) for i, r in enumerate(routings)]
                candidate.check(inputs[0], routings[0])
                calls = [
                    lambda c=candidate, w=copy, i=rows: c.pair(w, i)
                    for copy, rows in zip(candidate.copies, inputs, strict=False)
                ]
                graphs[candidate.name] = timing.capture_rotation(calls)
                if candidate.name == OURS:
                    graphs[f"{OURS} layer"] = timing.capture_rotation(
                        self.layer_calls(layer, candidate, routings)
                    )
            except torch.cuda.OutOfMemoryError as error:
                case["problems"][candidate.name] = f"{error}".splitlines()[0]
            except Exception as error:
                case["problems"][candidate.name] = f"{type(error).__name__}: {error}"[:300]
        names = list(graphs)
        for name, times in zip(
            names, timing.interleave(list(graphs.values()), self.options.seconds), strict=True
        ):
            graph = graphs[name]
            case["times"][name] = timing.summarize(times, graph.calls, len(routings)).as_dict()
            graph.release()
        self.record["cases"].append(case)
        line = ", ".join(f"{name} {t['median_us']:.1f}" for name, t in case["times"].items())
        print(
            f"{layer.name} {kind} b={tokens} rows={case['rows']:.0f} active={case['active']:.1f} "
            f"floor {case['floor_us']:.1f}: {line} {case['problems'] or ''}",
            flush=True,
        )

    def layer_calls(self, layer: Layer, ours: Candidate, routings: list[Routing]) -> list[Call]:
        first, second = (peer for peer in ours.peers if isinstance(peer, LiquidExperts))
        calls = []
        for (w1, w2), routing in zip(ours.copies, routings, strict=False):
            tokens = len(routing.ids)
            x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device="cuda")
            weights = torch.rand(tokens, layer.top_k, device="cuda")
            operands = (x, routing.ids, weights, w1, first.scale, w2, second.scale, None, None)
            operands += (layer.activation, layer.experts)
            calls.append(lambda o=operands: torch.ops.liquidgemm.moe(*o))
        return calls

    def sweep_case(self, layer: Layer, candidates: list[Candidate], tokens: int, kind: str) -> None:
        """Every plan of each product, interleaved."""
        (ours,) = candidates
        routings = self.routings(layer, tokens, kind)
        ours.grow(len(routings))
        inputs = [ours.inputs(layer, r, i) for i, r in enumerate(routings)]
        names = grouped_plan_names()
        mean = sum(r.rows for r in routings) / sum(r.active for r in routings)
        for at, (n, k) in enumerate(layer.products):
            peer = ours.peers[at]
            graphs = {}
            for plan, name in enumerate(names):
                height = int(name.split("_")[0][1:])
                if height > max(32, 8 * mean) or height * 16 < mean:
                    continue
                peer.plan = plan
                calls = [
                    lambda p=peer, w=copy[at], r=rows[at]: p.call(w, r)
                    for copy, rows in zip(ours.copies, inputs, strict=False)
                ]
                check(peer, inputs[0][at], calls[0](), routings[0])
                graphs[name] = timing.capture_rotation(calls)
            peer.plan = None
            found = timing.interleave(list(graphs.values()), self.options.seconds)
            times = {
                name: timing.summarize(one, graphs[name].calls, len(routings)).median_us
                for name, one in zip(graphs, found, strict=True)
            }
            for graph in graphs.values():
                graph.release()
            case = self.describe(layer, tokens, kind, routings)
            chosen = self.plans(layer, round(case["rows"]))[at]
            self.record["sweep"].append(
                case | {"product": at + 1, "n": n, "k": k, "times": times, "chosen": chosen}
            )
            ranked = sorted(times.items(), key=lambda item: item[1])
            print(
                f"{layer.name} {kind} b={tokens} product {at + 1}, active {case['active']:.1f}: "
                + ", ".join(f"{name} {us:.1f}" for name, us in ranked[:6])
                + f"; chosen {chosen.split('plan ')[1]}",
                flush=True,
            )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers",
        type=argument(choices(tuple(LAYERS))),
        default=",".join(MEASURED),
        help=f"default: %(default)s; also {', '.join(tuple(LAYERS)[len(MEASURED) :])}",
    )
    parser.add_argument(
        "--tokens",
        type=argument(parse_tokens),
        default=",".join(map(str, TOKENS)),
        help="over all ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--routing",
        type=argument(choices(ROUTINGS)),
        default=",".join(ROUTINGS),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--against",
        type=argument(parse_names),
        default="bf16,fp8,humming,humming-channel,humming-g128",
        help="default: %(default)s; empty: none",
    )
    parser.add_argument("--sweep", action="store_true", help="every plan of ours, and no peers")
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="per case (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument(
        "--commit", help="the commit to record, where the sources are no git checkout"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(words)
    require_gpu(parser)
    suite = Suite(options, machine.command_line("moe", words))
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in options.layers:
            suite.measure(LAYERS[name])
    device = torch.device("cuda", torch.cuda.current_device())
    suite.record["snapshots"].append(machine.snapshot("after", device))
    suite.save()
    if options.json:
        print(f"results: {options.json}; python -m bench moe-report makes tables and a plot of it")
    failed = any(case["problems"].get(OURS) for case in suite.record["cases"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
