"""Writes the README's table of times from a run's JSON, between its two marker lines.

python -m bench readme-table [bench/results/h100-sxm/2026-11-26/results.json]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..core import machine
from ..core.results import Run, load
from ..peers import OURS
from .tables import MISSING, number

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- times: make readme-table -->", "<!-- end of times -->"
TOKENS = (1, 16, 64, 128, 256, 1024, 4096)


def table(run: Run, path: str) -> str:
    """One row per shape, one column per number of tokens: ours / bf16 / FP8."""
    folder = Path(path).parent
    lines = [
        "µs per GEMM: liquidgemm / cuBLAS bf16 / cuBLAS FP8 (the faster of tensor-wise and "
        f"row-wise scales). {run.machine['gpu']}, weights not in the L2 cache, CUDA graphs, "
        f"medians of one interleaved run; commit {run.commit}, {run.started[:10]}, "
        f"`{reproduce(run.command)}`. All of that run, with plots, is in [{folder}]({folder}).",
        "",
        "| N x K | " + " | ".join(f"M = {m}" for m in TOKENS) + " |",
        "|---|" + "---|" * len(TOKENS),
    ]
    for shape in run.shapes:
        n, k = shape["n"], shape["k"]
        cases = {case.m: case for case in run.cases_of(n, k)}
        cells = [cell(cases[m]) if m in cases else MISSING for m in TOKENS]
        lines.append(f"| {n} x {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reproduce(command: str) -> str:
    """Without what only says where a program was and which commit it came from."""
    return re.sub(r" --(stream-floor|commit) \S+", "", command)


def cell(case) -> str:
    ours = case.best(OURS, "gemm")
    peers = [case.best(peer, "gemm") for peer in ("bf16", "fp8")]
    texts = [number(one and one.us) for one in (ours, *peers)]
    fastest = ours and all(peer is None or ours.us <= peer.us for peer in peers)
    return " / ".join([f"**{texts[0]}**" if fastest else texts[0], *texts[1:]])


def replace_between(text: str, content: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md: expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "results",
        nargs="?",
        help="JSON of a run, as a path from the repository's root (default: the newest)",
    )
    path = parser.parse_args(arguments).results or machine.newest_results()
    if path is None:
        parser.error(f"no results.json in {machine.RESULTS}/*/*")
    text = README.read_text(encoding="utf-8")
    README.write_text(replace_between(text, table(load(Path(path)), str(path))), encoding="utf-8")
