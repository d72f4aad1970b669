"""The record of a run, and its JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import machine
from .timing import Summary

SCHEMA = 1


class BadResults(Exception):
    """A file is no record of a run that this version can read."""


@dataclass
class Measurement:
    """One way of calling one peer at one size.

    Attributes:
        status: "ok", "unsupported" (it cannot do this size) or "failed" (it raised, or its result
            was wrong); `reason` says more.
        detail: what ran, such as the kernel configuration.
        error: relative error of the verified result; 0 if every bit was right.
        time: µs per call, if ok.
    """

    peer: str
    op: str
    variant: str
    status: str
    reason: str = ""
    detail: str = ""
    error: float | None = None
    time: Summary | None = None

    @property
    def us(self) -> float:
        assert self.time is not None
        return self.time.median_us


@dataclass
class Case:
    """All measurements of one product ``[m, k] x [n, k].T``."""

    n: int
    k: int
    m: int
    measurements: list[Measurement] = field(default_factory=list)

    def best(self, peer: str, op: str) -> Measurement | None:
        """The fastest way of a peer that is comparable to op, or None if none succeeded."""
        ways = [
            one
            for one in self.measurements
            if one.peer == peer and one.op in (op, "both") and one.status == "ok"
        ]
        return min(ways, key=lambda one: one.us, default=None)


@dataclass
class Run:
    """Everything that one call of the driver found.

    Attributes:
        partial: it was interrupted, or is not over.
        machine: `machine.describe`.
        protocol: what the numbers mean, in words and parameters.
        peers: per name: version, and "absent", the reason why it was not measured, or None.
        shapes: n, k and labels, in order.
        floors: `stream_floor.measure`; floor_problem says why one is missing.
        snapshots: `machine.snapshot` before, under load and after.
    """

    command: str
    commit: str
    started: str
    finished: str | None = None
    partial: bool = True
    machine: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    peers: dict[str, dict] = field(default_factory=dict)
    shapes: list[dict] = field(default_factory=list)
    floors: list[dict] = field(default_factory=list)
    floor_problem: str | None = None
    problem: str | None = None
    snapshots: list[dict] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def floor(self, n: int, k: int) -> dict | None:
        return next((one for one in self.floors if (one["n"], one["k"]) == (n, k)), None)

    def cases_of(self, n: int, k: int) -> list[Case]:
        return sorted((c for c in self.cases if (c.n, c.k) == (n, k)), key=lambda c: c.m)

    def save(self, path: Path) -> None:
        machine.save_json(path, {"schema": SCHEMA} | asdict(self))


def load(path: Path) -> Run:
    """
    Raises:
        BadResults: the file is not readable, no JSON, or of another schema.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadResults(f"{path}: {error}") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise BadResults(f"{path}: not a result of this benchmark (schema {SCHEMA})")
    try:
        data["cases"] = [_case(case) for case in data["cases"]]
        return Run(**data)
    except (KeyError, TypeError) as error:
        raise BadResults(f"{path}: damaged ({error!r})") from error


def _case(data: dict) -> Case:
    measurements = [_measurement(one) for one in data["measurements"]]
    return Case(data["n"], data["k"], data["m"], measurements)


def _measurement(data: dict[str, Any]) -> Measurement:
    time = data.get("time")
    if time is not None:
        time = Summary(**{one.name: time[one.name] for one in fields(Summary)})
    return Measurement(**(data | {"time": time}))
