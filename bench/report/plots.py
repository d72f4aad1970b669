"""Plots from the record of a run, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..core.results import Case, Run
from ..core.roofline import (
    H100,
    Ceilings,
    crossover_tokens,
    operations,
    roof_ops_per_us,
    roofline,
)
from ..peers import OURS
from .tables import comparisons

OUR_COLOUR = "#d62728"
FLOOR_COLOUR = "#767676"
# Okabe and Ito's colours, which the colour-blind can tell apart, without a red of their own.
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#8c564b")
FEW_TOKENS = 128  # where the weight's bytes should bind
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 10,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "liquidgemm",  # the same plot is the same file
}


def write(run: Run, folder: Path, ceilings: Ceilings = H100) -> list[Path]:
    """All plots of a run; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with mpl.rc_context(STYLE):
        for shape in run.shapes:
            n, k = shape["n"], shape["k"]
            cases = [case for case in run.cases_of(n, k) if case.best(OURS, "gemm")]
            if cases:
                figure = time_plot(run, cases, shape["labels"], ceilings)
                files += save(figure, run, folder / f"time_{n}x{k}")
        if any(case.best(OURS, "gemm") for case in run.cases):
            files += save(percent_plot(run, ceilings), run, folder / "roofline_percent")
            files += save(tops_plot(run, ceilings), run, folder / "roofline_tops")
        if any(floor_percent(run, shape) for shape in run.shapes):
            files += save(floor_plot(run), run, folder / "floor_percent")
    return files


def save(figure: Figure, run: Run, stem: Path) -> list[Path]:
    caption = f"{run.machine['gpu']}, commit {run.commit}, {run.started[:10]}"
    if run.partial:
        caption += ", partial run"
    return save_figure(figure, caption, stem)


def save_figure(figure: Figure, caption: str, stem: Path) -> list[Path]:
    figure.text(0.995, 0.008, caption, ha="right", va="bottom", fontsize=8, color="#555555")
    return write_figure(figure, stem)


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """As SVG, and as PNG for what draws no SVG; the same plot is the same file."""
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=150, metadata=metadata)
    return files


def new_figure(title: str, y_label: str, tokens: Sequence[int]) -> tuple[Figure, Axes]:
    # Figure without pyplot: no display, and nothing global to close.
    figure = Figure(figsize=(7.6, 5.0))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.98, top=0.92, bottom=0.13)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("M (tokens)")
    axes.set_ylabel(y_label)
    axes.set_xscale("log", base=2)
    shown = [m for m in tokens if m & (m - 1) == 0] or list(tokens)
    axes.set_xticks(shown, [str(m) for m in shown], fontsize=9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    return figure, axes


def plain_y(axes: Axes) -> None:
    """Log scale with ticks at 1, 2, 5 and written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def time_plot(run: Run, cases: list[Case], labels: list[str], ceilings: Ceilings) -> Figure:
    n, k = cases[0].n, cases[0].k
    tokens = [case.m for case in cases]
    where = f" ({', '.join(labels)})" if labels else ""
    figure, axes = new_figure(
        f"Time of one product, N = {n}, K = {k}{where}", "time (µs), median, p10 to p90", tokens
    )
    plain_y(axes)
    grid = fine_grid(tokens)
    axes.plot(
        grid,
        [roofline(m, n, k, ceilings).us for m in grid],
        color=FLOOR_COLOUR,
        linewidth=1,
        linestyle=(0, (1, 1.5)),
        label=roof_label(ceilings),
        zorder=1,
    )
    floor = run.floor(n, k)
    if floor is not None:
        axes.axhline(
            floor["pdl_us"],
            color=FLOOR_COLOUR,
            linewidth=1,
            linestyle=(0, (5, 3)),
            label="stream floor",
            zorder=1,
        )
    for index, column in enumerate(comparisons(run, cases)):
        draw(
            axes,
            [(case.m, column.of(case)) for case in cases],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.3,
            label=column.title,
        )
    ours = {"color": OUR_COLOUR, "marker": "o", "zorder": 3}
    linear = [(case.m, case.best(OURS, "linear")) for case in cases]
    gemm = [(case.m, case.best(OURS, "gemm")) for case in cases]
    draw(
        axes,
        linear,
        linewidth=1.3,
        linestyle="--",
        markersize=4,
        markerfacecolor="white",
        label="liquidgemm linear",
        **ours,
    )
    draw(axes, gemm, linewidth=2.2, markersize=5, label="liquidgemm gemm", **ours)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="upper left")  # ours on top, as it was drawn
    return figure


def draw(axes: Axes, points: list, **style) -> None:
    """A line through the medians, and bars from p10 to p90."""
    points = [(m, one.time) for m, one in points if one is not None]
    if not points:
        return
    tokens = [m for m, _ in points]
    axes.plot(tokens, [time.median_us for _, time in points], **style)
    axes.vlines(
        tokens,
        [time.p10_us for _, time in points],
        [time.p90_us for _, time in points],
        color=style["color"],
        linewidth=3,
        alpha=0.3,
        zorder=2,
    )


def gemm_times(run: Run) -> list[tuple[str, list[tuple[int, int, int, float]]]]:
    """Per shape its name, and (m, n, k, µs) of liquidgemm's gemm."""
    lines = []
    for shape in run.shapes:
        n, k = shape["n"], shape["k"]
        times = [(case.m, case.best(OURS, "gemm")) for case in run.cases_of(n, k)]
        points = [(m, n, k, one.us) for m, one in times if one is not None]
        if points:
            lines.append((f"{n} x {k}", points))
    return lines


def fine_grid(tokens: Sequence[int]) -> list[float]:
    """From the fewest to the most tokens in even steps of a log scale."""
    low, high = min(tokens), max(tokens)
    return [low * (high / low) ** (i / 100) for i in range(101)]


def all_tokens(run: Run) -> list[int]:
    return sorted({case.m for case in run.cases})


def shape_style(index: int) -> dict:
    colours = (OUR_COLOUR, *COLOURS)
    markers = ("o", *MARKERS)
    return {
        "color": colours[index % len(colours)],
        "marker": markers[index % len(markers)],
        "linestyle": "-" if index < len(colours) else "--",
        "linewidth": 1.4,
        "markersize": 4.5,
    }


def percent_plot(run: Run, ceilings: Ceilings) -> Figure:
    figure, axes = new_figure(
        "liquidgemm gemm: share of the roofline",
        "roofline time / measured time (%)",
        all_tokens(run),
    )
    for index, (name, points) in enumerate(gemm_times(run)):
        percent = [100 * roofline(m, n, k, ceilings).us / us for m, n, k, us in points]
        axes.plot([p[0] for p in points], percent, label=name, **shape_style(index))
    axes.axhline(100, color=FLOOR_COLOUR, linewidth=1.6, label=roof_label(ceilings))
    mark_crossover(axes, ceilings)
    axes.set_ylim(0, max(110, axes.get_ylim()[1]))
    legend_below(axes)
    return figure


def tops_plot(run: Run, ceilings: Ceilings) -> Figure:
    tokens = all_tokens(run)
    figure, axes = new_figure(
        "liquidgemm gemm: throughput under the roof",
        "2MNK / time (TOPS)",
        tokens,
    )
    plain_y(axes)
    grid = fine_grid(tokens)
    roof = [roof_ops_per_us(m, ceilings) / 1e6 for m in grid]
    label = roof_label(ceilings)
    axes.plot(grid, roof, color=FLOOR_COLOUR, linewidth=1.6, label=label, zorder=1)
    for index, (name, points) in enumerate(gemm_times(run)):
        speeds = [operations(m, n, k) / us / 1e6 for m, n, k, us in points]
        axes.plot([p[0] for p in points], speeds, label=name, **shape_style(index))
    mark_crossover(axes, ceilings)
    legend_below(axes)
    return figure


def floor_percent(run: Run, shape: dict) -> list[tuple[int, float]]:
    """(M, stream floor / measured time in %) of liquidgemm's gemm, up to FEW_TOKENS."""
    n, k = shape["n"], shape["k"]
    floor = run.floor(n, k)
    if floor is None:
        return []
    times = [(case.m, case.best(OURS, "gemm")) for case in run.cases_of(n, k)]
    return [(m, 100 * floor["pdl_us"] / one.us) for m, one in times if one and m <= FEW_TOKENS]


def floor_plot(run: Run) -> Figure:
    lines = [(shape, floor_percent(run, shape)) for shape in run.shapes]
    figure, axes = new_figure(
        "liquidgemm gemm in decoding: share of the stream floor",
        "time to copy the packed weight / measured time (%)",
        sorted({m for _, points in lines for m, _ in points}),
    )
    for index, (shape, points) in enumerate(lines):
        if points:
            name = f"{shape['n']} x {shape['k']}"
            tokens, percent = zip(*points, strict=True)
            axes.plot(tokens, percent, label=name, **shape_style(index))
    axes.axhline(100, color=FLOOR_COLOUR, linewidth=1.6, label="stream floor, launches hidden")
    axes.set_ylim(0, max(110, axes.get_ylim()[1]))
    axes.legend(loc="lower left", title="N x K", fontsize=9, ncols=2)
    return figure


def roof_label(ceilings: Ceilings) -> str:
    rates = f"{ceilings.bytes_per_us / 1e6:.3g} TB/s, {ceilings.ops_per_us / 1e6:.0f} TOPS"
    return f"roofline ({rates})"


def legend_below(axes: Axes) -> None:
    axes.legend(loc="lower right", title="N x K", fontsize=9, ncols=2 if len(axes.lines) > 5 else 1)


def mark_crossover(axes: Axes, ceilings: Ceilings) -> None:
    """Where the roofline turns from memory to multiplications."""
    at = crossover_tokens(ceilings)
    low, high = axes.get_xlim()
    if not low < at < high:
        return
    axes.axvline(at, color=FLOOR_COLOUR, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    place = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": "#555555", "y": 1.0}
    axes.text(at * 0.93, s="memory binds", ha="right", va="top", **place)
    axes.text(at * 1.08, s="MMA binds", ha="left", va="top", **place)
