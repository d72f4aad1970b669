"""Tables and plots of ``python -m bench serve``, from its JSON alone.

python -m bench serve-report serve_*.json --out FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ..core.engine import FORMATS
from ..core.results import BadResults
from ..suites.serve import SCHEMA
from . import command
from .step import table

OURS = "w4a8"
PEERS = ("humming", "fp8")
Row = dict


def read(paths: Iterable[Path]) -> list[dict]:
    """Records of runs, the oldest first.

    Raises:
        BadResults: a file is not readable, no JSON, or of another kind.
    """
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadResults(f"{path}: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise BadResults(f"{path}: expected results of `bench serve`, schema {SCHEMA}")
        if not all({"model", "format", "steps"} <= set(row) for row in record.get("rows", [{}])):
            raise BadResults(f"{path}: expected rows of `bench serve`")
        records.append(record)
    return sorted(records, key=lambda record: record.get("started", ""))


def groups(records: list[dict]) -> dict[tuple, list[Row]]:
    """Rows by model, KV dtype and prompt, in the order of `FORMATS`; of one format the last."""
    found: dict[tuple, dict[str, Row]] = {}
    for record in records:
        for row in record["rows"]:
            if row.get("status") == "ok" and row["steps"]:
                place = row["model"], row["layers"], row["kv"], row["tokens_in"]
                found.setdefault(place, {})[row["format"]] = row
    return {
        place: [rows[name] for name in FORMATS if name in rows] for place, rows in found.items()
    }


def _by_batch(rows: list[Row], cell: Callable[[dict], float], digits: int, higher: bool) -> str:
    """A figure by requests and format, and how many times better ours is than its peers."""
    cells = {row["format"]: {s["batch"]: cell(s) for s in row["steps"]} for row in rows}
    peers = [name for name in PEERS if name in cells and OURS in cells]
    lines = []
    for batch in sorted({batch for found in cells.values() for batch in found}):
        line = [str(batch)]
        line += [f"{c[batch]:.{digits}f}" if batch in c else "" for c in cells.values()]
        for name in peers:
            both = [cells[key].get(batch) for key in (name, OURS)]
            if None in both:
                line.append("")
                continue
            theirs, ours = both
            line.append(f"{ours / theirs if higher else theirs / ours:.2f}x")
        lines.append(line)
    return table(["requests", *cells, *(f"over {name}" for name in peers)], lines)


def about_table(rows: list[Row]) -> str:
    """Start-up, room and one long prompt; room only of an engine that had the GPU alone."""
    lines = []
    for row in rows:
        together = row.get("engines_at_once", 1)
        with_others = f", {together} at once" if together > 1 else ""
        prompt = row.get("prompt")
        lines.append(
            [
                row["format"],
                f"{row['started_s']:.0f}{with_others}",
                "" if together > 1 else str(row["kv_tokens"]),
                f"{prompt['first_token_s'] * 1e3:.1f} ({prompt['tokens']})" if prompt else "",
                f"{row['bytes_per_weight']:.2f}",
                ", ".join(row["methods"]),
            ]
        )
    head = ["format", "start, s", "KV room, tokens", "first token, ms (of tokens)"]
    return table([*head, "bytes per weight", "computed by"], lines)


def markdown(records: list[dict]) -> str:
    machines = sorted({str(record["machine"].get("gpu")) for record in records})
    commits = sorted({record["commit"][:12] for record in records})
    failed = [
        f"{row['model']} {row['format']}: {row.get('reason', row['status'])}."
        for record in records
        for row in record["rows"]
        if row.get("status") != "ok" or "reason" in row
    ]
    parts = [
        "# Models in vLLM",
        f"{', '.join(machines)}; commit {', '.join(commits)}; {records[0]['started'][:10]}. "
        "Weights are random. What a figure is says `python -m bench serve --help`.",
        *(f"Not measured: {line}" for line in failed),
    ]
    for (model, layers, kv, tokens), rows in groups(records).items():
        parts += [
            f"## {model}, {layers} layers, KV {kv}, prompts of {tokens} tokens",
            "Decode step, ms:",
            _by_batch(rows, lambda step: step["step_ms"], 2, False),
            "Time until all have their first token, ms:",
            _by_batch(rows, lambda step: step["prefill_s"] * 1e3, 1, False),
            "Output tokens per second, prefill included:",
            _by_batch(rows, lambda step: step["tokens_per_s"], 0, True),
            about_table(rows),
        ]
    parts += ["## Commands", *(f"`{record['command']}`" for record in records)]
    return "\n\n".join(parts) + "\n"


def write_plots(records: list[dict], folder: Path) -> list[Path]:
    """ms per decode step by requests, one plot for each group."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .plots import COLOURS, OUR_COLOUR, STYLE, write_figure

    files: list[Path] = []
    with mpl.rc_context(STYLE):
        for (model, layers, kv, tokens), rows in groups(records).items():
            figure = Figure(figsize=(6.4, 4.2), layout="constrained")
            axes = figure.subplots()
            colours = iter(COLOURS)
            for row in rows:
                points = sorted((step["batch"], step["step_ms"]) for step in row["steps"])
                name = row["format"]
                colour = OUR_COLOUR if name == OURS else next(colours)
                axes.plot(*zip(*points, strict=True), "o-", label=name, color=colour)
            axes.set(xscale="log", xlabel="requests at once", ylabel="ms per decode step", ylim=0)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_title(f"vLLM, {model}, {layers} layers, KV {kv}, prompts of {tokens} tokens")
            axes.legend()
            files += write_figure(figure, folder / f"serve_{model}_{layers}_{kv}_{tokens}")
    return files


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.split("\n", maxsplit=1)[0]
    return command.run("serve", about, arguments, read, markdown, write_plots)
