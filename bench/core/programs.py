"""Builds and runs the C++ programs of cpp/, and keeps their tables."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import machine

SOURCES = machine.ROOT / "bench/cpp"
FOLDER = machine.ROOT / "build/bench"
SCHEMA = 1

Row = dict[str, "int | float | str | None"]


class ProgramError(Exception):
    """A program could not be built; the message says why."""


@dataclass
class Record:
    """The tables that C++ programs printed, and what they ran on.

    Attributes:
        tables: per program its rows, by column.
        problems: per program why it has none, or not all.
    """

    command: str
    commit: str
    started: str
    machine: dict
    tables: dict[str, list[Row]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        machine.save_json(path, {"schema": SCHEMA} | asdict(self))


def load(path: Path) -> Record:
    """
    Raises:
        results.BadResults: the file is not readable, no JSON, or of another schema.
    """
    from .results import BadResults

    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadResults(f"{path}: {error}") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA or "tables" not in data:
        raise BadResults(f"{path}: not the tables of the C++ programs (schema {SCHEMA})")
    try:
        return Record(**data)
    except TypeError as error:
        raise BadResults(f"{path}: damaged ({error})") from error


def new_record(command: str, commit: str | None) -> Record:
    """An empty record of this machine; a GPU must be present."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Record(command, commit or machine.commit(), machine.now(), machine.describe(device))


def build(programs: Sequence[str], folder: Path = FOLDER) -> None:
    """Configures and builds programs with the compiler and the headers that the library uses.

    Raises:
        ProgramError: cmake, a compiler or the CUTLASS headers are missing, or a step failed.
    """
    import setup_toolchain  # the project's own, at the root of the checkout

    try:
        tools = setup_toolchain.Toolchain.find()
    except SystemExit as error:
        raise ProgramError(str(error)) from error
    configure = [
        *("cmake", "-S", str(SOURCES), "-B", str(folder)),
        f"-DCUTLASS_INCLUDE={tools.cutlass}",
        f"-DCMAKE_CUDA_COMPILER={tools.nvcc}",
    ]
    compile_all = ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target"]
    for command in (configure, [*compile_all, *programs]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ProgramError(f"cmake: {error}") from error
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise ProgramError(f"{' '.join(command)} failed:\n{last}")


def run(
    program: Path, arguments: Sequence[str], timeout: float = 300
) -> tuple[list[Row], str | None]:
    """The rows that a program printed, and why some or all are missing."""
    if not program.exists():
        return [], f"{program.name} has not been built: python -m bench micro builds it"
    try:
        done = subprocess.run(
            [str(program.resolve()), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out.decode() if isinstance(out, bytes) else out
        return parse(text[: text.rfind("\n") + 1]), f"{program.name} took more than {timeout:g} s"
    except OSError as error:
        return [], f"{program.name} did not run: {error}"
    problem = None
    if done.returncode:
        problem = done.stderr.strip() or f"{program.name} exited with {done.returncode}"
    return parse(done.stdout), problem


def parse(text: str) -> list[Row]:
    """Tab-separated lines under a header; lines with # are comments, "-" is no value."""
    lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    if not lines:
        return []
    header, *rows = lines
    return [dict(zip(header, map(_value, row), strict=True)) for row in rows]


def _value(text: str) -> int | float | str | None:
    if text == "-":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def heading(record: Record, title: str, text: str) -> str:
    """Two paragraphs of Markdown: what was measured on which machine, and how to read it."""
    gpu = record.machine
    return (
        f"# {title} on {gpu['gpu']}\n\n"
        f"{gpu['sms']} SMs, driver {gpu['driver'] or 'unknown'}; commit {record.commit}, "
        f"{record.started[:10]}: `{record.command}`. {text}"
    )


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table with the rows' own columns."""
    if not rows:
        return []
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join("-" if v is None else str(v) for v in row.values()) + " |")
    return lines


def text_table(rows: Sequence[Row]) -> str:
    """The same for a terminal."""
    cells = [list(rows[0])] + [["-" if v is None else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
