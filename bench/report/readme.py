"""Writes the tables of times from a run's JSON, each between its two marker lines: all of them in
docs/performance.md, those of one weight in the README.

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
PERFORMANCE = machine.ROOT / "docs/performance.md"
BEGIN, END = "<!-- times: make readme-table -->", "<!-- end of times -->"
TOKENS = (1, 16, 64, 128, 256, 1024, 4096)

# The README's: one weight, Llama-3-8B's gate and up projections.
SHAPE = (28672, 4096)
FEW_TOKENS = (1, 16, 64, 256, 4096)
PEERS = ("bf16", "fp8")


def table(run: Run, path: str, base: str = "") -> str:
    """One row per shape, one column per number of tokens: ours / bf16 / FP8.

    `path` is that of the results from the root, `base` what leads there from the document.
    """
    folder = Path(path).parent
    lines = [
        "µs per GEMM: liquidgemm / cuBLAS bf16 / cuBLAS FP8 (the faster of tensor-wise and "
        f"row-wise scales). {run.machine['gpu']}, weights not in the L2 cache, CUDA graphs, "
        f"medians of one interleaved run; commit {run.commit}, {run.started[:10]}, "
        f"`{reproduce(run.command)}`. All of that run, with plots, is in "
        f"[{folder}]({base}{folder}).",
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


def short_table(run: Run, n: int, k: int, tokens: tuple[int, ...] = FEW_TOKENS) -> str:
    """One row per number of tokens of one weight."""
    cases = {case.m: case for case in run.cases_of(n, k)}
    if missing := [m for m in tokens if m not in cases]:
        raise SystemExit(f"results: expected {n} x {k} at M = {missing}, which are not there")
    lines = [
        f"| tokens, N = {n}, K = {k} | liquidgemm, µs | cuBLAS bf16 | cuBLAS FP8 |",
        "|---:|---:|---:|---:|",
    ]
    for m in tokens:
        ours, *peers = times(cases[m])
        cells = [number(ours), *(f"{number(us)} ({ratio(us, ours)})" for us in peers)]
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    lines += ["", f"{run.machine['gpu']}, commit {run.commit}, {run.started[:10]}."]
    return "\n".join(lines)


def reproduce(command: str) -> str:
    """Without what only says where a program was and which commit it came from, and with the name
    that the suite has today."""
    command = re.sub(r" --(stream-floor|commit) \S+", "", command)
    return re.sub(r"^python -m bench(?= -|$)", "python -m bench gemm", command)


def times(case) -> list[float | None]:
    """Ours, then those of the peers."""
    found = [case.best(peer, "gemm") for peer in (OURS, *PEERS)]
    return [one and one.us for one in found]


def ratio(us: float | None, ours: float | None) -> str:
    return f"{us / ours:.2f}x" if us and ours else MISSING


def cell(case) -> str:
    ours, *peers = times(case)
    texts = [number(us) for us in (ours, *peers)]
    fastest = ours and all(us is None or ours <= us for us in peers)
    return " / ".join([f"**{texts[0]}**" if fastest else texts[0], *texts[1:]])


def replace_between(text: str, content: str, name: str = "README.md") -> str:
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{name}: expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "results",
        nargs="?",
        help="JSON of a run, as a path from the repository's root (default: the newest)",
    )
    path = parser.parse_args(arguments).results or machine.newest_results()
    if path is None:
        parser.error(f"no results.json in {machine.RESULTS}/*/*")
    run = load(Path(path))
    contents = {
        PERFORMANCE: table(run, str(path), "../"),
        README: short_table(run, *SHAPE),
    }
    for file, content in contents.items():
        text = replace_between(file.read_text(encoding="utf-8"), content, file.name)
        file.write_text(text, encoding="utf-8")
