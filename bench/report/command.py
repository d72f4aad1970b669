"""The command of a report that is made of several records: tables, and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..core.results import BadResults


def run(
    suite: str,
    about: str,
    arguments: list[str] | None,
    read: Callable[[Iterable[Path]], list[dict]],
    markdown: Callable[[list[dict]], str],
    write_plots: Callable[[list[dict], Path], list[Path]],
) -> int:
    """Writes the tables of `python -m bench SUITE`'s records to SUITE.md, and says what it wrote.

    Returns:
        The status of the command: 1 where `read` raises BadResults.
    """
    prog = f"python -m bench {suite}-report"
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("records", type=Path, nargs="+", help=f"JSON of bench {suite}")
    parser.add_argument("--out", type=Path, help="folder (default: that of the first record)")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    try:
        records = read(options.records)
    except BadResults as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    folder = options.out or options.records[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    tables = folder / f"{suite}.md"
    tables.write_text(markdown(records))
    print(tables)
    if options.plots:
        for path in write_plots(records, folder):
            print(path)
    return 0
