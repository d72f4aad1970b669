"""What an eager call costs on the CPU: ours beside `F.linear` and `nn.Linear`.

    python -m bench host --json host_cost.json

In eager mode a small model waits for the CPU, not for the GPU. Each candidate is called --calls
times in a row without waiting for the GPU, whose queue has room for them; then the GPU is waited
for, and the next candidate follows. A figure is the median over --rounds such turns.

The steps of an eager `linear` follow: the op without the Python function around it, the same below
autograd, and the GEMM and the quantizer alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import liquidgemm

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_shapes, parse_tokens

MODES: dict[str, Callable] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
QUEUE = 1024  # launches that the driver takes before a launch waits
LAUNCHES = 3  # of one call, at most


def candidates(n: int, k: int, m: int) -> dict[str, Callable[[], object]]:
    """What is called, by name; the first four are compared."""
    dense = nn.Linear(k, n, bias=True, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    quantized = liquidgemm.LiquidLinear.from_linear(dense, method="rtn")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    arguments = (quantized.packed, quantized.scale, quantized.bias)
    x8, scale = liquidgemm.quantize_activation(x)
    op = torch.ops.liquidgemm.linear.default

    def below_autograd() -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, *arguments)

    return {
        "F.linear": lambda: F.linear(x, dense.weight, dense.bias),
        "nn.Linear": lambda: dense(x),
        "linear": lambda: liquidgemm.linear(x, *arguments),
        "LiquidLinear": lambda: quantized(x),
        "the op alone": lambda: op(x, *arguments),
        "the op below autograd": below_autograd,
        "gemm": lambda: liquidgemm.gemm(x8, scale, *arguments),
        "quantize_activation": lambda: liquidgemm.quantize_activation(x),
        "torch.empty": lambda: torch.empty((m, n), device="cuda", dtype=torch.bfloat16),
    }


def measure(
    calls: dict[str, Callable[[], object]], count: int, rounds: int, mode: Callable
) -> dict[str, list[float]]:
    """CPU time per call in µs, of every round; candidates take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with mode():
        for call in calls.values():
            for _ in range(20):
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter_ns()
                for _ in range(count):
                    call()
                times[name].append((time.perf_counter_ns() - start) / count / 1e3)
    torch.cuda.synchronize()
    return times


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench host", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", type=Path, help="where the times go")
    parser.add_argument("--shapes", type=argument(parse_shapes), default="1024x1024", help="N x K")
    parser.add_argument("--m", type=argument(parse_tokens), default="1,16,64", help="tokens")
    parser.add_argument("--calls", type=int, default=200, help="in a row (default 200)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each (default 30)")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if not 1 <= options.calls <= QUEUE // LAUNCHES:
        parser.error(f"--calls: expected 1 to {QUEUE // LAUNCHES}, got {options.calls}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    require_gpu(parser)

    rows = []
    for shape in options.shapes:
        for m in options.m:
            calls = candidates(shape.n, shape.k, m)
            for mode, context in MODES.items():
                times = measure(calls, options.calls, options.rounds, context)
                median = {name: statistics.median(values) for name, values in times.items()}
                print(f"\nN={shape.n} K={shape.k} M={m}, {mode}: CPU µs per call", flush=True)
                for name, us in median.items():
                    base = {"linear": "F.linear", "LiquidLinear": "nn.Linear"}.get(name)
                    beside = f"  {us - median[base]:+.1f} beside {base}" if base else ""
                    print(f"  {name:22} {us:7.2f}{beside}", flush=True)
                rows += [
                    {"n": shape.n, "k": shape.k, "m": m, "mode": mode, "call": name, "us": us}
                    for name, us in median.items()
                ]
    if options.json:
        record = {
            "commit": options.commit or machine.commit(),
            "started": machine.now(),
            "command": machine.command_line("host", words),
            "processor": processor(),
            "machine": machine.describe(torch.device("cuda", torch.cuda.current_device())),
            "rows": rows,
        }
        machine.save_json(options.json, record)
    return 0


def processor() -> str:
    """The CPU's name, whose speed the figures depend on."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
