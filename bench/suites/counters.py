"""Where the time of a product goes, by the GPU's own counters: one row per product.

    python -m bench counters --json counters.json          on a Hopper GPU, with Nsight Compute

Each product runs once, on cold weights, under `ncu`, with clocks as they are. Columns, in percent
of what the GPU could do over the whole time of the kernel: `tensor`, cycles in which the tensor
cores multiplied; `issue`, issue slots used; `shared`, wavefronts of shared memory by instructions,
wgmma's operands among them, but not what TMA writes; `l2` and `dram`, throughput. `stalls`: what
the warps waited for, in percent of all samples, the three most frequent reasons (`barrier` is
mostly the wait for wgmma, `long_scoreboard` that for a stage).
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import liquidgemm

from ..core import machine, programs
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_shapes, parse_tokens
from ..core.weights import random_weights

# The worst of few tokens, a large product, and two that leave ragged rounds.
PRODUCTS = "4096x4096:64,6144x4096:128,28672x4096:64,28672x4096:4096,10240x8192:256,10240x8192:512"

METRICS = {  # what of ncu, and the factor that makes it our unit
    "us": ("gpu__time_duration.sum", 1e-3),  # ns
    "sm_mhz": ("gpc__cycles_elapsed.avg.per_second", 1e-6),
    "tensor": ("sm__pipe_tensor_op_imma_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "issue": ("sm__inst_issued.avg.pct_of_peak_sustained_elapsed", 1),
    "shared": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed", 1),
    "l2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
}
STALL = re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+?)(_not_issued)?$")
MOST_STALLS = 3


class NoCounters(Exception):
    """Nsight Compute did not do its work; the message says why."""


def parse_products(text: str) -> list[tuple[int, int, int]]:
    """N, K and M of each part of "4096x14336:64,llama3-8b:16".

    Raises:
        ValueError: a part is not of that kind.
    """
    products = []
    for part in text.split(","):
        shapes, _, tokens = part.partition(":")
        try:
            products += [(s.n, s.k, m) for s in parse_shapes(shapes) for m in parse_tokens(tokens)]
        except ValueError as error:
            raise ValueError(f"{part!r} is not NxK:M, such as 4096x14336:64: {error}") from error
    return products


def read_report(text: str) -> list[programs.Row]:
    """A row per kernel of what `ncu --csv --page raw` printed.

    Raises:
        NoCounters: there is no table in it.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise NoCounters(f"ncu printed no table: {' '.join(lines[-5:]) or 'nothing at all'}")
    names, _, *kernels = csv.reader(lines[first:])  # the second line has the units
    rows = []
    for kernel in kernels:
        values = dict(zip(names, kernel, strict=True))
        row = {
            column: round(_number(values[metric]) * unit, 1)
            for column, (metric, unit) in METRICS.items()
        }
        rows.append(row | {"stalls": _stalls(values)})
    return rows


def _number(text: str) -> float:
    return float(text.replace(",", "") or 0)


def _stalls(values: dict[str, str]) -> str:
    samples = {
        match[1]: _number(values[name])
        for name in values
        if (match := STALL.match(name)) and not match[2]
    }
    total = sum(samples.values()) or 1
    most = sorted(samples, key=samples.__getitem__, reverse=True)[:MOST_STALLS]
    return ", ".join(f"{name} {100 * samples[name] / total:.0f}" for name in most)


def run_products(products: list[tuple[int, int, int]]) -> None:
    """What ncu looks at: every product once."""
    for n, k, m in products:
        weights = random_weights(n, k)
        # As a quantizer leaves them: normally distributed.
        x = torch.randn(m, k, device="cuda").mul_(30).clamp_(-127, 127).round_().to(torch.int8)
        x_scale, scale = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        for weight in weights[1:]:  # pushes the first one out of the L2 cache
            weight.add_(0)
        liquidgemm.gemm(x, x_scale, weights[0], scale)
        torch.cuda.synchronize()


def measure(products: list[tuple[int, int, int]]) -> list[programs.Row]:
    """
    Raises:
        NoCounters: ncu is missing or failed.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NoCounters("ncu is not on PATH: it comes with the CUDA toolkit")
    words = ",".join(f"{n}x{k}:{m}" for n, k, m in products)
    metrics = ",".join(metric for metric, _ in METRICS.values())
    command = [
        *(ncu, "--clock-control", "none", "--kernel-name", "regex:gemm_kernel"),
        *("--metrics", metrics, "--section", "SourceCounters", "--csv", "--page", "raw"),
        *(sys.executable, "-m", "bench", "counters", "--products", words, "--run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCounters(f"ncu failed: {(done.stderr or done.stdout).strip()[-500:]}")
    counted = read_report(done.stdout)
    if len(counted) != len(products):
        raise NoCounters(f"ncu saw {len(counted)} kernels, expected {len(products)}")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for (n, k, m), row in zip(products, counted, strict=True):
        plan = re.search(r"plan (\S+);", machine.chosen_plan(m, n, k, device))
        rows.append({"N": n, "K": k, "M": m, "plan": plan[1]} | row)
    return rows


def markdown(record: programs.Record) -> str:
    text = (
        "One run of each product under Nsight Compute, cold; percent of what the GPU could do over "
        "the kernel's time, and what warps waited for, in percent of samples. bench/counters.py "
        "says what each column counts."
    )
    table = "\n".join(programs.markdown_table(record.tables["counters"]))
    return f"{programs.heading(record, 'Counters', text)}\n\n{table}\n"


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench counters", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument(
        "--products",
        type=argument(parse_products),
        default=PRODUCTS,
        help="comma-separated NxK:M (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    parser.add_argument("--run", action="store_true", help="only run them: for ncu to look at")
    options = parser.parse_args(words)
    require_gpu(parser)
    if options.run:
        run_products(options.products)
        return 0
    record = programs.new_record(machine.command_line("counters", words), options.commit)
    try:
        rows = record.tables["counters"] = measure(options.products)
    except NoCounters as error:
        print(f"python -m bench counters: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        record.save(options.json)
    print(programs.text_table(rows))
    return 0
