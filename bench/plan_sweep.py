"""Times every plan of the kernel: a tile, and how CTAs share it. What the heuristic is fitted to.

    python -m bench.plan_sweep --json sweep.json       on a Hopper GPU, four minutes
    python -m bench.fit_plan sweep.json                anywhere

Cold weights, CUDA graphs and random data as in the benchmark, but unverified: the tests do that.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator

import torch

import liquidgemm
from liquidgemm._timing import capture

from . import machine

SHAPES = [
    "4096x4096",
    "6144x4096",
    "4096x14336",
    "28672x4096",
    "10240x8192",
    "8192x28672",
    "2048x2048",
    "1024x8192",
    "8192x1024",
    "2560x2560",
    "576x1536",
    "1536x576",
    "57344x8192",
]
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 320, 448, 512, 640, 1024, 1100, 4096)
COLD_BYTES = 160e6  # more than three times the L2 cache
CALLS = 48
REPLAYS = 4


def plausible_plans(m: int, wanted: str) -> Iterator[tuple[int, str]]:
    """Index and name, without tiles far too large or too small for m tokens."""
    names = torch.ops.liquidgemm_testing.config_names()
    for config in torch.ops.liquidgemm_testing.plausible_configs(m):
        if re.search(wanted, names[config]):
            yield config, names[config]


def random_weights(n: int, k: int) -> list[torch.Tensor]:
    """Copies of one packed weight, enough to find the L2 cache cold."""
    blocks = -(-k // 64)
    qweight = torch.randint(0, 256, (n, blocks * 32), dtype=torch.uint8, device="cuda")
    qscale = torch.randint(1, 18, (n, blocks), dtype=torch.uint8, device="cuda")
    packed = liquidgemm.pack_weight(qweight, qscale, torch.zeros_like(qscale))
    copies = max(2, int(COLD_BYTES / packed.numel()) + 1)
    return [packed, *(packed.clone() for _ in range(copies - 1))]


def time_plan(
    m: int, k: int, weights: list[torch.Tensor], scale: torch.Tensor, config: int
) -> float:
    """Median time of one call in µs."""
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    x_scale = torch.rand(m, device="cuda")
    run = torch.ops.liquidgemm_testing.gemm_with_config
    calls = [
        lambda w=w: run(x, x_scale, w, scale, None, torch.bfloat16, config, 0) for w in weights
    ]
    calls[0]()
    graph = capture(calls, max(len(calls), int(CALLS * min(1, 512 / m))))
    times = []
    for _ in range(REPLAYS):
        # Many tokens heat the GPU up to its power limit: the plan measured last would lose most.
        time.sleep(0 if m < 128 else 0.01)
        graph.timed_replay()  # an idle GPU takes longer for the first
        events = graph.timed_replay()
        events[1].synchronize()
        times.append(graph.time_us(events))
    graph.release()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", required=True, help="where the times go")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="N x K, for example 4096x4096")
    parser.add_argument("--m", default=",".join(map(str, TOKENS)), help="numbers of tokens")
    parser.add_argument("--plans", default="", help="regular expression, all plans by default")
    arguments = parser.parse_args()

    device = torch.cuda.get_device_properties(0)
    rows: list[dict] = []
    result = {
        "gpu": device.name,
        "sms": device.multi_processor_count,
        "memory_bytes_per_us": machine.memory_bytes_per_us(device),
        "rows": rows,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        for shape in arguments.shapes.split(","):
            n, k = map(int, shape.split("x"))
            weights = random_weights(n, k)
            scale = torch.rand(n, device="cuda")
            for m in map(int, arguments.m.split(",")):
                times = {
                    name: time_plan(m, k, weights, scale, config)
                    for config, name in plausible_plans(m, arguments.plans)
                }
                if not times:
                    continue
                name, us = min(times.items(), key=lambda item: item[1])
                print(f"{shape} m={m}: best {name}: {us:.2f} us", flush=True)
                rows += [
                    {"n": n, "k": k, "m": m, "plan": plan, "us": us} for plan, us in times.items()
                ]
                torch.cuda.empty_cache()  # the graphs' memory
            del weights
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main()
