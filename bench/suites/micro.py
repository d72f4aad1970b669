"""``python -m bench micro``: builds and runs the C++ microbenchmarks, prints their tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core import machine, programs
from ..core.shapes import argument, parse_shapes

TITLES = {
    "stream_floor": "Stream floor: packed bytes into shared memory",
    "mma_rate": "INT8 WGMMA issue rate",
    "mma_int4": "INT4 mma.sync issue rate",
    "dequant_cost": "Dequantization in registers",
    "lds_rate": "Reading weights from shared memory",
    "gemm": "The library's GEMM through its C++ API",
}
SUSTAIN_SECONDS = "2"


def arguments_of(name: str) -> list[str]:
    if name in ("stream_floor", "gemm"):
        return [str(shape) for shape in parse_shapes("targets")]
    return ["--sustain", SUSTAIN_SECONDS] if name == "mma_rate" else []


def parse_names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in TITLES:
            raise ValueError(f"{name!r} is none of {', '.join(TITLES)}")
    if not names:
        raise ValueError("no microbenchmarks given")
    return names


def markdown(record: programs.Record) -> str:
    """All tables; what the columns mean is said at the head of each program's source."""
    text = "Each program's source in bench/cpp says what its columns mean."
    parts = [programs.heading(record, "Microbenchmarks", text)]
    for name, title in TITLES.items():
        rows, problem = record.tables.get(name), record.problems.get(name)
        if rows or problem:
            parts.append(f"## {title} (`{name}`)")
        if problem:
            parts.append(f"**Not complete**: {problem}")
        if rows:
            parts.append("\n".join(programs.markdown_table(rows)))
    return "\n\n".join(parts) + "\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench micro", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument(
        "--only",
        type=argument(parse_names),
        default=list(TITLES),
        help=f"comma-separated: {', '.join(TITLES)} (default: all)",
    )
    add_program_options(parser)
    return parser


def add_program_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=programs.FOLDER,
        help="where the programs are built (default: build/bench)",
    )
    parser.add_argument("--no-build", action="store_true", help="run what is there")
    parser.add_argument(
        "--commit", help="the commit to record, where the sources are no git checkout"
    )


def build_and_run(
    record: programs.Record,
    jobs: dict[str, list[str]],
    options: argparse.Namespace,
    timeout: float = 300,
) -> None:
    """Runs every program with its arguments into the record, which is saved after each.

    Raises:
        ProgramError: a program could not be built.
    """
    if not options.no_build:
        print(f"building {', '.join(jobs)} in {options.folder}", flush=True)
        programs.build(list(jobs), options.folder)
    for name, arguments in jobs.items():
        rows, problem = programs.run(options.folder / name, arguments, timeout)
        record.tables[name] = rows
        if problem:
            record.problems[name] = problem
        if options.json:
            record.save(options.json)
        print(f"\n{name}{': ' + problem if problem else ''}")
        if rows:
            print(programs.text_table(rows), flush=True)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(words)
    machine.require_gpu(parser)
    record = programs.new_record(machine.command_line("micro", words), options.commit)
    try:
        build_and_run(record, {name: arguments_of(name) for name in options.only}, options)
    except programs.ProgramError as error:
        print(f"python -m bench micro: error: {error}", file=sys.stderr)
        return 1
    return 1 if record.problems else 0
