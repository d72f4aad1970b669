"""Runs the microbenchmark cpp/stream_floor.cu and reads its table."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .machine import ROOT
from .shapes import Shape

BUILD = "cmake -S bench/cpp -B build/bench && cmake --build build/bench"
PROGRAM = ROOT / "build/bench/stream_floor"


def measure(program: Path, shapes: Sequence[Shape]) -> tuple[list[dict], str | None]:
    """One record per shape, and why there is none.

    A record has n, k, bytes, and µs per launch: single_us (ordinary launches) and pdl_us
    (programmatic dependent launches).
    """
    if not program.exists():
        return [], f"{program.name} has not been built: {BUILD}"
    try:
        done = subprocess.run(
            [str(program.resolve()), *map(str, shapes)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"{program.name} did not run: {error}"
    records = parse(done.stdout)
    if done.returncode:
        return records, done.stderr.strip() or f"{program.name} exited with {done.returncode}"
    return records, None


def parse(text: str) -> list[dict]:
    """The tab-separated lines under the header that starts with N; lines with # are comments."""
    lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    if not lines:
        return []
    header, *rows = lines
    records = [dict(zip(header, row, strict=True)) for row in rows]
    return [
        {
            "n": int(record["N"]),
            "k": int(record["K"]),
            "bytes": int(record["bytes"]),
            "single_us": float(record["single_us"]),
            "pdl_us": float(record["pdl_us"]),
        }
        for record in records
    ]
