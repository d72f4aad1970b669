"""``python -m bench ablation``: what each part of the design is worth, after the paper's figure 13.

The kernels are in cpp/ablation.hpp. Times come from a Hopper GPU; table and plot are made of the
JSON file anywhere (python -m bench report).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from ..core import machine, programs
from ..core.results import BadResults
from ..core.shapes import MODELS, argument, parse_shapes
from . import micro

NAME = "ablation"
ABLATED = ("llama2-7b", "llama2-13b", "llama2-70b", "mixtral")
VARIANTS = {
    "baseline": "QServe's dequantization, no overlap",
    "lqq": "+ LiquidQuant's dequantization",
    "excp": "+ explicit coarse-grained pipeline (ExCP)",
    "imfp": "+ implicit fine-grained pipeline (ImFP)",
}
BASE = "baseline"
PAPER_LQQ = 1.29  # the most that the paper reports for LiquidQuant alone
SMALL_BATCH = 32

Times = dict[tuple[int, int, int], dict[str, float]]  # (n, k, m) -> variant -> µs


@dataclass(frozen=True)
class Point:
    """A model's four layers at one batch size: µs in all, by variant."""

    model: str
    m: int
    us: dict[str, float]

    def speedup(self, variant: str) -> float:
        return self.us[BASE] / self.us[variant]


def times(record: programs.Record) -> Times:
    """
    Raises:
        BadResults: the record has no complete case of the ablation.
    """
    cases: Times = {}
    for row in record.tables.get(NAME, []):
        cases.setdefault((row["N"], row["K"], row["M"]), {})[row["variant"]] = row["us"]
    complete = {at: us for at, us in cases.items() if us.keys() == VARIANTS.keys()}
    if not complete:
        problem = record.problems.get(NAME, "the file has no rows of it")
        raise BadResults(f"no complete case of the ablation: {problem}")
    return complete


def points(cases: Times) -> list[Point]:
    """Per model and batch size, where all four layers were measured."""
    found = []
    for model in ABLATED:
        layers = [(n, k) for _, n, k in MODELS[model]]
        for m in sorted({m for _, _, m in cases}):
            if all((n, k, m) in cases for n, k in layers):
                us = {v: sum(cases[n, k, m][v] for n, k in layers) for v in VARIANTS}
                found.append(Point(model, m, us))
    return found


def claims(cases: Times) -> list[tuple[str, str]]:
    """What the paper says, and what these times say to it."""

    def ratios(of: str, over: str, most: int | None = None) -> list[float]:
        """How many times faster `over` is than `of`."""
        return [us[of] / us[over] for (_, _, m), us in cases.items() if most is None or m <= most]

    def spread(values: list[float]) -> str:
        return f"{min(values):.2f}x to {max(values):.2f}x, median {statistics.median(values):.2f}x"

    lqq = ratios("baseline", "lqq")
    excp_small, excp = ratios("lqq", "excp", SMALL_BATCH), ratios("lqq", "excp")
    imfp, imfp_over_excp = ratios("lqq", "imfp"), ratios("excp", "imfp")

    def above_one(values: list[float]) -> str:
        return f"faster in {sum(v > 1 for v in values)} of {len(values)} cases"

    return [
        (f"LiquidQuant alone: up to {PAPER_LQQ}x over the baseline", spread(lqq)),
        (
            "ExCP hurts small batches, helps large ones",
            f"over lqq up to {SMALL_BATCH} tokens {above_one(excp_small)} ({spread(excp_small)}); "
            f"over all {above_one(excp)} ({spread(excp)})",
        ),
        ("ImFP always helps", f"over lqq {above_one(imfp)}: {spread(imfp)}"),
        ("ImFP is ahead of ExCP", f"{above_one(imfp_over_excp)}: {spread(imfp_over_excp)}"),
    ]


def markdown(record: programs.Record) -> str:
    """
    Raises:
        BadResults: the record has no complete case of the ablation.
    """
    cases = times(record)
    machine = record.machine
    lines = [
        f"# Ablation on {machine['gpu']}",
        "",
        f"Commit {record.commit}, {record.started[:10]}: `{record.command}`. Speedups over the "
        "baseline; weights not in the L2 cache, CUDA graphs, medians. bench/cpp/ablation.cu says "
        "what the variants are.",
        "",
    ]
    if NAME in record.problems:
        lines += [f"**Not complete**: {record.problems[NAME]}", ""]
    lines += ["| claim of the paper (arXiv 2509.01229) | here |", "|---|---|"]
    lines += [f"| {claim} | {here} |" for claim, here in claims(cases)]
    lines += ["", "## Four layers of a model, one after the other", ""]
    others = [name for name in VARIANTS if name != BASE]
    lines += [f"| model | M | {BASE} µs | " + " | ".join(others) + " |"]
    lines += ["|---|" + "---:|" * (2 + len(others))]
    for point in points(cases):
        speedups = " | ".join(f"{point.speedup(name):.2f}x" for name in others)
        lines.append(f"| {point.model} | {point.m} | {point.us[BASE]:.1f} | {speedups} |")
    lines += ["", "## Single layers", ""]
    lines += [f"| N x K | M | {BASE} µs | " + " | ".join(others) + " |"]
    lines += ["|---|" + "---:|" * (2 + len(others))]
    for (n, k, m), us in cases.items():
        speedups = " | ".join(f"{us[BASE] / us[name]:.2f}x" for name in others)
        lines.append(f"| {n} x {k} | {m} | {us[BASE]:.2f} | {speedups} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench ablation", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument(
        "--shapes",
        type=argument(parse_shapes),
        default=",".join(ABLATED),
        help="comma-separated: NxK, or the layers of models by name (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    micro.add_program_options(parser)
    options = parser.parse_args(words)
    machine.require_gpu(parser)
    record = programs.new_record(machine.command_line("ablation", words), options.commit)
    jobs = {NAME: [str(shape) for shape in options.shapes]}
    try:
        micro.build_and_run(record, jobs, options)
        print("\n" + markdown(record), end="")
    except (programs.ProgramError, BadResults) as error:
        print(f"python -m bench ablation: error: {error}", file=sys.stderr)
        return 1
    return 1 if record.problems else 0
