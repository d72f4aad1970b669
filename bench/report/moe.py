"""Tables and plot of ``python -m bench moe``, from its JSON alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OURS = "liquidgemm"
LAYER = f"{OURS} layer"
COLOURS = {
    OURS: "#d62728",
    LAYER: "#ff9896",
    "bf16": "#7f7f7f",
    "fp8": "#0072b2",
    "humming": "#009e73",
    "humming-channel": "#e69f00",
    "humming-g128": "#cc79a7",
}


def table(cases: list[dict]) -> str:
    """Markdown: µs of both products, ours also over the floor, and of our whole layer."""
    names = list(dict.fromkeys(name for case in cases for name in case["times"]))
    peers = [name for name in names if name not in (OURS, LAYER)]
    head = ["tokens", "rows / experts", "floor", OURS, "x floor", "layer", *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        times = {name: one["median_us"] for name, one in case["times"].items()}

        def us(name: str, times: dict = times) -> str:
            return f"{times[name]:.1f}" if name in times else "-"

        over = f"{times[OURS] / case['floor_us']:.2f}" if OURS in times else "-"
        row = [
            str(case["tokens"]),
            f"{case['rows']:.0f} / {case['active']:.1f}",
            f"{case['floor_us']:.1f}",
            us(OURS),
            over,
            us(LAYER),
            *map(us, peers),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def skew_table(cases: list[dict]) -> str:
    """Markdown: how many times as long a skewed routing takes as a uniform one."""
    names = (OURS, LAYER)
    head = ["layer", "tokens", *names, "floor"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    uniform = {(c["layer"], c["tokens"]): c for c in cases if c["routing"] == "uniform"}
    for case in cases:
        other = uniform.get((case["layer"], case["tokens"]))
        if case["routing"] == "uniform" or other is None:
            continue
        ratios = [
            f"{case['times'][name]['median_us'] / other['times'][name]['median_us']:.2f}"
            if name in case["times"] and name in other["times"]
            else "-"
            for name in names
        ]
        floor = f"{case['floor_us'] / other['floor_us']:.2f}"
        row = [case["layer"], str(case["tokens"]), *ratios, floor]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def sweep_table(cases: list[dict]) -> str:
    """Markdown: per product the fastest plans, and how far behind the chosen one is."""
    head = ["tokens", "product", "fastest", "µs", "chosen", "x fastest"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        best, us = min(case["times"].items(), key=lambda item: item[1])
        chosen = case["chosen"].split("plan ")[1].split(",")[0]
        of_chosen = case["times"].get(chosen)
        behind = f"{of_chosen / us:.2f}" if of_chosen else "not timed"
        row = [str(case["tokens"]), f"{case['n']} x {case['k']}", best, f"{us:.1f}", chosen, behind]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def groups(cases: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for case in cases:
        found.setdefault((case["layer"], case["routing"]), []).append(case)
    return found


def markdown(record: dict) -> str:
    parts = [
        "# Layers of experts",
        f"- {record['machine'].get('gpu', record['machine'])}\n- {record['started']}, commit "
        f"{record['commit']}\n- `{record['command']}`\n- floor: "
        f"{record['stream_bytes_per_us'] * 1e-6:.2f} TB/s, 1750 TOPS",
        "Medians in µs per call: both products on sorted rows of INT8 (bf16, FP8 for those peers); "
        "layer: ours from tokens to their sums.",
    ]
    parts += [f"Absent: {name}: {why}" for name, why in record["absent"].items()]
    for (layer, routing), cases in groups(record["cases"]).items():
        parts += [f"## {layer}, {routing}", table(cases)]
    if len({case["routing"] for case in record["cases"]}) > 1:
        parts += ["## Skewed over uniform", skew_table(record["cases"])]
    for (layer, routing), cases in groups(record["sweep"]).items():
        parts += [f"## Plans: {layer}, {routing}", sweep_table(cases)]
    return "\n\n".join(parts) + "\n"


def plot(record: dict, stem: Path) -> None:
    """Times over the floor by tokens, a panel per layer and routing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .plots import write_figure

    panels = list(groups(record["cases"]).items())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((layer, routing), cases) in zip(axes.flat, panels, strict=False):
        for name in dict.fromkeys(name for case in cases for name in case["times"]):
            points = [
                (case["tokens"], case["times"][name]["median_us"] / case["floor_us"])
                for case in cases
                if name in case["times"]
            ]
            axis.plot(*zip(*points, strict=True), "o-", ms=3, label=name, color=COLOURS.get(name))
        axis.axhline(1, color="black", lw=0.6, ls=":")
        axis.set(xscale="log", yscale="log", title=f"{layer}, {routing}")
        axis.set(xlabel="tokens", ylabel="time over floor")
        axis.grid(True, alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    write_figure(figure, stem)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench moe-report", description=__doc__)
    parser.add_argument("json", type=Path, help="what `python -m bench moe --json` wrote")
    options = parser.parse_args(arguments)
    record = json.loads(options.json.read_text())
    options.json.with_suffix(".md").write_text(markdown(record))
    if record["cases"]:
        plot(record, options.json.with_suffix(""))
    return 0
