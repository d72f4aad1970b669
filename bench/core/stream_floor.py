"""The stream floor of a run: what cpp/stream_floor.cu measures for its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import programs
from .shapes import Shape

PROGRAM = programs.FOLDER / "stream_floor"


def measure(program: Path, shapes: Sequence[Shape]) -> tuple[list[dict], str | None]:
    """One record per shape, and why some or all are missing.

    A record has n, k, bytes, and µs per launch: single_us (ordinary launches) and pdl_us
    (programmatic dependent launches).
    """
    rows, problem = programs.run(program, [str(shape) for shape in shapes], timeout=120)
    times = ("bytes", "single_us", "pdl_us")
    return [{"n": r["N"], "k": r["K"]} | {key: r[key] for key in times} for r in rows], problem
