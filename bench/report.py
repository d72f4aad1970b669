"""``python -m bench.report RESULTS.json``: tables and plots from a run; needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from . import tables
from .results import BadResults, Run, load


class NoPlots(Exception):
    """matplotlib is missing."""


def write_plots(run: Run, folder: Path) -> list[Path]:
    """
    Raises:
        NoPlots: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPlots("plots need matplotlib: pip install matplotlib")
    from . import plots

    return plots.write(run, folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Makes a Markdown table and plots of the results of python -m bench. "
        "Without options, the table goes to standard output.",
    )
    parser.add_argument("results", type=Path, help="the JSON file")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="where to write the table")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where to write PNG and SVG")
    options = parser.parse_args(arguments)
    try:
        run = load(options.results)
        text = tables.markdown(run)
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(text)
        if options.plots:
            for path in write_plots(run, options.plots):
                print(path)
    except (BadResults, NoPlots) as error:
        print(f"python -m bench.report: error: {error}", file=sys.stderr)
        return 1
    if not options.markdown and not options.plots:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
