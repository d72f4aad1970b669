"""``python -m bench report RESULTS``: tables and plots from a run; needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from ..core import programs
from ..core.results import BadResults, Run, load
from ..core.roofline import ceilings_of
from ..suites import ablation, counters, micro, sustained
from . import tables

RESULTS, MICROBENCHMARKS, ABLATION = "results*.json", "microbench.json", "ablation.json"
SUSTAINED, COUNTERS = "sustained.json", "counters.json"


class NoPlots(Exception):
    """matplotlib is missing."""


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPlots("plots need matplotlib: pip install matplotlib")


def write_plots(run: Run, folder: Path, microbenchmarks: Path | None = None) -> list[Path]:
    """
    Raises:
        NoPlots: matplotlib is not installed.
    """
    require_matplotlib()
    from . import plots

    return plots.write(run, folder, ceilings_of(run, microbenchmarks))


def write_folder(folder: Path) -> list[Path]:
    """Table and plots of every record in a folder, beside it; returns the files.

    Raises:
        NoPlots: matplotlib is not installed.
        BadResults: a record cannot be read, or there is none.
    """
    require_matplotlib()
    written: list[Path] = []

    def write_text(name: str, text: str) -> None:
        (folder / name).write_text(text)
        written.append(folder / name)

    measured = folder / MICROBENCHMARKS
    for path in sorted(folder.glob(RESULTS)):  # results_humming.json is a run of its own
        run = load(path)
        write_text(f"{path.stem}.md", tables.markdown(run, ceilings_of(run, measured)))
        plots = folder / path.stem.replace("results", "plots", 1)
        written += write_plots(run, plots, measured)
    if measured.exists():
        write_text("microbench.md", micro.markdown(programs.load(measured)))
    if (folder / SUSTAINED).exists():
        write_text("sustained.md", sustained.markdown(programs.load(folder / SUSTAINED)))
    if (folder / COUNTERS).exists():
        write_text("counters.md", counters.markdown(programs.load(folder / COUNTERS)))
    if (folder / ABLATION).exists():
        from . import ablation_plot

        record = programs.load(folder / ABLATION)
        write_text("ablation.md", ablation.markdown(record))
        written += ablation_plot.write(record, folder / "plots")
    if not written:
        names = ", ".join((RESULTS, MICROBENCHMARKS, SUSTAINED, COUNTERS, ABLATION))
        raise BadResults(f"{folder} has none of {names}")
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Makes Markdown tables and plots of the results of python -m bench, "
        "bench micro and bench ablation. For a file without options, the table goes to "
        "standard output.",
    )
    parser.add_argument(
        "results",
        type=Path,
        help="the JSON file of python -m bench; or a folder of such files, named "
        f"{RESULTS}, {MICROBENCHMARKS}, {SUSTAINED}, {COUNTERS} and {ABLATION}, where tables "
        "and plots go as well",
    )
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="where to write the table")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where to write PNG and SVG")
    parser.add_argument(
        "--ceilings",
        type=Path,
        metavar="JSON",
        help="microbenchmarks of the same GPU (default: microbench.json beside the results)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.results.is_dir():
            if options.markdown or options.plots or options.ceilings:
                parser.error("a folder takes no options: everything goes beside its files")
            for path in write_folder(options.results):
                print(path)
            return 0
        run = load(options.results)
        measured = options.ceilings or options.results.with_name(MICROBENCHMARKS)
        if options.ceilings and not options.ceilings.exists():
            raise BadResults(f"{options.ceilings}: No such file")
        text = tables.markdown(run, ceilings_of(run, measured))
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(text)
        if options.plots:
            for path in write_plots(run, options.plots, measured):
                print(path)
    except (BadResults, NoPlots) as error:
        print(f"python -m bench report: error: {error}", file=sys.stderr)
        return 1
    if not options.markdown and not options.plots:
        print(text, end="")
    return 0
