"""Times every plan of the kernel: a tile, and how CTAs share it. What the heuristic is fitted to.

    python -m bench sweep --json plan_sweep.json        on a Hopper GPU, seven minutes
    python -m bench fit plan_sweep.json --write h100    anywhere

Cold weights, CUDA graphs and random data as in the benchmark, but unverified: the tests do that. A
change that concerns some sizes or plans alone needs these alone: with --update the file keeps all
other rows. `runs` in it says when, of which commit and by which command each row was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from liquidgemm.cli._timing import capture
from liquidgemm.ops.plans import plan_names

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_shapes, parse_tokens
from ..core.weights import FORMATS, random_weights

TOKENS = [1, 8, 16, 32, 64, 96, 128, 192, 256, 320, 448, 512, 640, 1024, 1100, 4096]
# What the heuristic is fitted to: the benchmark's shapes and awkward ones, with many numbers of
# tokens, and layers of other models, so that the constants hold between these, too.
BENCHMARKED = (
    "4096x4096,6144x4096,4096x14336,28672x4096,10240x8192,8192x28672,57344x8192,"
    "2048x2048,1024x8192,8192x1024,2560x2560,576x1536,1536x576"
)
OF_OTHER_MODELS = (
    "18944x3584,3584x18944,3584x3584,4608x3584,37888x3584,12288x4096,4096x12288,24576x4096,"
    "13824x5120,5120x13824,27648x5120,10240x5120,17408x5120,5120x17408,25600x5120,5120x8192,"
    "8192x2048,3072x8192,9728x2560,2560x9728,7168x2048,2048x7168,18432x7168,7168x18432"
)
SWEEPS = (
    (parse_shapes(BENCHMARKED), TOKENS),
    (parse_shapes(OF_OTHER_MODELS), [1, 4, 8, 16, 32, 64, 128, 256, 512]),
)
CALLS = 48
REPLAYS = 4


def plausible_plans(m: int, wanted: str, format: str) -> Iterator[tuple[int, str]]:
    """Index and name, without tiles far too large or too small for m tokens."""
    names = plan_names()
    for plan in torch.ops.liquidgemm_plan.plausible(m, format):
        if re.search(wanted, names[plan]):
            yield plan, names[plan]


def time_plan(m: int, k: int, weights: list[torch.Tensor], scale: torch.Tensor, plan: int) -> float:
    """Median time of one call in µs."""
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    x_scale = torch.rand(m, device="cuda")
    run = torch.ops.liquidgemm_testing.gemm_with_plan
    calls = [lambda w=w: run(x, x_scale, w, scale, None, torch.bfloat16, plan, 0) for w in weights]
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


def measure(n: int, k: int, tokens: list[int], wanted: str, format: str) -> Iterator[dict]:
    """A row for every plan of one weight, and on the screen the best one for each m."""
    weights = random_weights(n, k, format)
    scale = torch.rand(n, device="cuda")
    for m in tokens:
        times = {
            name: time_plan(m, k, weights, scale, plan)
            for plan, name in plausible_plans(m, wanted, format)
        }
        torch.cuda.empty_cache()  # the graphs' memory
        if times:
            best = min(times, key=times.get)
            print(f"{n}x{k} m={m}: best {best}: {times[best]:.2f} us", flush=True)
        for plan, us in times.items():
            yield {"n": n, "k": k, "m": m, "plan": plan, "us": us}


def merged(before: dict, run: dict, rows: list[dict]) -> dict:
    """`before`, with rows of a new run in place of those of the same problem and plan.

    Runs of which no row is left are left out, too.
    """

    def key(row: dict) -> tuple:
        return row["n"], row["k"], row["m"], row["plan"]

    measured = set(map(key, rows))
    runs = [*before["runs"], run]
    kept = [row for row in before["rows"] if key(row) not in measured]
    kept += [row | {"run": len(runs) - 1} for row in rows]
    used = sorted({row["run"] for row in kept})
    return before | {
        "runs": [runs[index] for index in used],
        "rows": [row | {"run": used.index(row["run"])} for row in kept],
    }


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench sweep", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", required=True, type=Path, help="where the times go")
    parser.add_argument(
        "--shapes",
        type=argument(parse_shapes),
        help="models or N x K (default: what the heuristic is fitted to)",
    )
    parser.add_argument(
        "--m",
        type=argument(parse_tokens),
        help=f"tokens (default: {TOKENS}, fewer for some of the default shapes)",
    )
    parser.add_argument(
        "--format", default="liquidquant", choices=tuple(FORMATS), help="of the weights"
    )
    parser.add_argument("--plans", default="", help="regular expression, all plans by default")
    parser.add_argument("--update", action="store_true", help="keep what is not measured anew")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    require_gpu(parser)

    device = torch.cuda.get_device_properties(0)
    before = {
        "gpu": device.name,
        "sms": device.multi_processor_count,
        "memory_bytes_per_us": machine.memory_bytes_per_us(device),
        "format": options.format,
        "runs": [],
        "rows": [],
    }
    if options.update:
        before = json.loads(options.json.read_text())
        if before["gpu"] != device.name:
            parser.error(f"--update: {options.json} is of {before['gpu']}, this is {device.name}")
        if before.get("format", "liquidquant") != options.format:
            parser.error(f"--update: {options.json} is of another format than {options.format}")
    run = {
        "commit": options.commit or machine.commit(),
        "started": machine.now(),
        "command": machine.command_line("sweep", words),
    }
    sweeps = [(options.shapes, TOKENS)] if options.shapes else SWEEPS
    problems = [(shape, options.m or tokens) for shapes, tokens in sweeps for shape in shapes]
    rows: list[dict] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for shape, tokens in problems:
            rows += measure(shape.n, shape.k, tokens, options.plans, options.format)
            machine.save_json(options.json, merged(before, run, rows), indent=None)
    return 0
