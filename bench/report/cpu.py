"""Table and plot of ``python -m bench cpu``, from its JSON alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OURS = "liquidgemm"
OUR_COLOUR = "#d62728"
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#8c564b")


def packed_bytes(n: int, k: int) -> int:
    return -(-n // 64) * -(-k // 64) * 2176


def table(result: dict) -> str:
    """Markdown: times of ours, and how many times longer each of the others takes."""
    names = [name for name in result["cases"][0]["times"] if name != OURS]
    head = ["N x K", "tokens", "threads", f"{OURS}, µs", "GB/s of packed weight", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in result["cases"]:
        times = case["times"]
        ours = times[OURS]["min_us"]
        row = [
            f"{case['n']} x {case['k']}",
            str(case["m"]),
            str(case["threads"]),
            f"{ours:.0f}",
            f"{packed_bytes(case['n'], case['k']) / ours / 1e3:.1f}",
            *(f"{times[name]['min_us'] / ours:.2f}x" for name in names),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def markdown(result: dict) -> str:
    bandwidth = ", ".join(
        f"{threads} threads {rate / 1e9:.1f} GB/s"
        for threads, rate in result["copy_bytes_per_s"].items()
    )
    facts = [
        f"- Processor: {result['processor']}; kernels {', '.join(result['cpu_kernels'])}",
        f"- Ours: `{result['kernel']}`; instruction set asked of all: {result['isa']}",
        f"- torch {result['torch']}; {result['ggml'] or 'without llama.cpp'}",
        f"- Copy bandwidth (bytes read plus written): {bandwidth}",
        f"- Load average at the start: {result['load'][0]:.1f}",
        f"- {result['date']}, commit {result['commit']}",
        f"- `{result['command']}`",
    ]
    legend = (
        "Minimum of interleaved calls over cold weights, of the thread's processor time with one "
        "thread, else of the wall's. A column with x: how many times as long "
        "as ours it takes; more than 1 means that ours is faster."
    )
    return "\n\n".join(["# linear on the CPU", "\n".join(facts), legend, table(result)]) + "\n"


def plot(result: dict, stem: Path) -> list[Path]:
    """Time over tokens, one panel per weight and number of threads."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .plots import write_figure

    panels = sorted({(case["n"], case["k"], case["threads"]) for case in result["cases"]})
    with mpl.rc_context({"svg.hashsalt": OURS, "axes.grid": True, "grid.color": "#e4e4e4"}):
        figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
        for index, (n, k, threads) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            cases = [c for c in result["cases"] if (c["n"], c["k"], c["threads"]) == panels[index]]
            for place, name in enumerate(cases[0]["times"]):
                axes.loglog(
                    [case["m"] for case in cases],
                    [case["times"][name]["min_us"] for case in cases],
                    marker="o",
                    color=OUR_COLOUR if name == OURS else COLOURS[(place - 1) % len(COLOURS)],
                    linewidth=2.2 if name == OURS else 1.2,
                    label=name,
                )
            axes.set_title(f"{n} x {k}, {threads} threads")
            axes.set_xlabel("tokens")
            axes.set_ylabel("µs per call (minimum)")
        figure.axes[0].legend(fontsize=8, frameon=False)
        return write_figure(figure, stem)


def write(folder: Path) -> list[Path]:
    """Reads cpu.json of the folder; writes cpu.md and the plot beside it."""
    result = json.loads((folder / "cpu.json").read_text())
    (folder / "cpu.md").write_text(markdown(result))
    return [folder / "cpu.md", *plot(result, folder / "cpu")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench cpu-report", description=__doc__)
    parser.add_argument("folder", type=Path)
    for file in write(parser.parse_args(arguments).folder):
        print(file)
