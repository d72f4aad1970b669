"""The plot of an ablation, after figure 13 of the LiquidGEMM paper."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ..core import programs
from ..suites.ablation import ABLATED, BASE, VARIANTS, points, times
from .plots import FLOOR_COLOUR, OUR_COLOUR, STYLE, save_figure

LABELS = {
    "lqq": "LiquidQuant",
    "excp": "LiquidQuant and ExCP",
    "imfp": "LiquidQuant and ImFP",
}
COLOURS = {"lqq": "#0072b2", "excp": "#e69f00", "imfp": OUR_COLOUR}
MARKERS = {"lqq": "s", "excp": "^", "imfp": "o"}


def write(record: programs.Record, folder: Path) -> list[Path]:
    """The plot as PNG and SVG; none if no model has all of its layers.

    Raises:
        results.BadResults: the record has no complete case of the ablation.
    """
    found = points(times(record))
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 3.6))
        every = figure.subplots(1, len(ABLATED), sharey=True)
        figure.subplots_adjust(left=0.06, right=0.99, top=0.78, bottom=0.2, wspace=0.08)
        tokens = sorted({point.m for point in found})
        for axes, model in zip(every, ABLATED, strict=True):
            of_model = [point for point in found if point.model == model]
            axes.set_title(model, fontsize=10, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_xticks(tokens, [str(m) for m in tokens], fontsize=8)
            axes.set_xlabel("batch (tokens)")
            axes.axhline(1, color=FLOOR_COLOUR, linewidth=1.2, label=f"baseline: {VARIANTS[BASE]}")
            for name in COLOURS:
                axes.plot(
                    [point.m for point in of_model],
                    [point.speedup(name) for point in of_model],
                    color=COLOURS[name],
                    marker=MARKERS[name],
                    markersize=4.5,
                    linewidth=1.5,
                    label=LABELS[name],
                )
        every[0].set_ylabel("speedup over the baseline")
        every[0].set_ylim(bottom=0)
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=9)
        caption = f"{record.machine['gpu']}, commit {record.commit}, {record.started[:10]}"
        return save_figure(figure, caption, folder / "ablation")
