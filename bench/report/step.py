"""Tables and plots of ``python -m bench step``, from its JSON alone.

python -m bench step-report step_*.json --out FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..core.results import BadResults
from ..decoder.formats import FORMATS
from ..suites.step import SCHEMA
from . import command

OURS = "w4a8"
# Table 1 of arXiv 2509.01229, as far as it is known here: tokens/s, and sequences where it says, on
# an H800 of 80 GB with 1024 tokens in and 512 out. They can only be decode steps without prefill.
PAPER = {
    "llama3-8b": {
        "TensorRT-LLM FP16": (13920, None),
        "TensorRT-LLM W4A16": (12997, None),
        "TensorRT-LLM FP8": (16820, 256),
        "QServe": (5240, 128),
        "LiquidServe": (16694, None),
    },
    "llama2-70b": {"LiquidServe": (3695, 184)},
}

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
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or "rows" not in record:
            raise BadResults(f"{path}: not a result of bench step (schema {SCHEMA})")
        records.append(record)
    return sorted(records, key=lambda record: record["started"])


def place(row: Row) -> tuple:
    """What is measured: of two rows at one place the later one counts."""
    if "prefill" in row:
        return (row["model"], row["layers"], row["format"], row["head"], *row["prefill"])
    settings = row["kv"], row["head"], row["context"]
    return (row["model"], row["layers"], row["format"], *settings, row["wanted_batch"])


def rows_of(records: list[dict]) -> list[Row]:
    found = {place(row): row for record in records for row in record["rows"]}
    return list(found.values())


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown; the first column is a name."""
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*rows, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    return f"{row['ms']:.2f}"


def groups(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Steps by model, layers, KV cache, head and context."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if "prefill" not in row:
            key = row["model"], row["layers"], row["kv"], row["head"], row["context"]
            found.setdefault(key, []).append(row)
    return found


def _formats(rows: list[Row]) -> list[str]:
    return [name for name in FORMATS if any(row["format"] == name for row in rows)]


def _at(rows: list[Row], form: str, batch: int) -> Row | None:
    same = (r for r in rows if r["format"] == form and r["wanted_batch"] == batch)
    return next(same, None)


def step_table(rows: list[Row]) -> str:
    """ms by batch and format, and how many times faster ours is than each FP8."""
    formats = _formats(rows)
    fp8 = [name for name in formats if name.startswith("fp8")] if OURS in formats else []
    batches = sorted({r["wanted_batch"] for r in rows if r["wanted_batch"] != "max"})
    lines = []
    for batch in batches:
        cells = {name: _at(rows, name, batch) for name in formats}
        ours = cells.get(OURS)
        speedups = []
        for name in fp8:
            both = [row for row in (ours, cells[name]) if row and row["status"] == "ok"]
            speedups.append(f"{both[1]['ms'] / both[0]['ms']:.2f}x" if len(both) == 2 else "")
        lines.append([str(batch), *(_ms(cells[name]) for name in formats), *speedups])
    return table(["sequences", *formats, *(f"over {name}" for name in fp8)], lines)


def parts_table(rows: list[Row]) -> str:
    """Where the time of a step goes, in ms."""
    names = ("linear", "attention", "head", "rest")
    lines = [
        [
            f"{row['format']}, {row['batch']}",
            f"{row['ms']:.2f}",
            *(f"{row['parts'][name]:.2f}" for name in names),
            f"{row['gb_per_s']:.0f}",
        ]
        for row in rows
        if row.get("parts")
    ]
    head = ["format, sequences", "step", *names, "GB/s of weights and KV"]
    return table(head, lines) if lines else ""


def most_table(rows: list[Row]) -> str:
    """The paper's Table 1: the most tokens/s of each model, and at how many sequences."""
    whole = [row for row in rows if row.get("tokens_per_s") and row["status"] == "ok"]
    models = list(dict.fromkeys(row["model"] for row in whole))
    best: dict[tuple[str, str], Row] = {}
    for row in whole:
        key = f"{row['format']}, KV {row['kv']}, head {row['head']}", row["model"]
        if key not in best or row["tokens_per_s"] > best[key]["tokens_per_s"]:
            best[key] = row
    systems = sorted(dict.fromkeys(system for system, _ in best))
    lines = [
        [
            system,
            *(
                f"{row['tokens_per_s']:.0f} ({row['batch']})"
                if (row := best.get((system, model)))
                else ""
                for model in models
            ),
        ]
        for system in systems
    ]
    for system in dict.fromkeys(name for model in models for name in PAPER.get(model, {})):
        figures = [PAPER.get(model, {}).get(system) for model in models]
        if any(figures):
            cells = [_figure(figure) for figure in figures]
            lines.append([f"*the paper: {system}, H800*", *cells])
    return table(["decode, tokens/s (sequences)", *models], lines)


def _figure(figure: tuple[int, int | None] | None) -> str:
    if figure is None:
        return ""
    rate, batch = figure
    return f"{rate}" if batch is None else f"{rate} ({batch})"


def prefill_table(rows: list[Row]) -> str:
    found = [row for row in rows if "prefill" in row]
    formats = _formats(found)
    places = list(dict.fromkeys((r["model"], r["head"], *r["prefill"]) for r in found))
    lines = []
    for model, head, batch, length in places:
        cells = []
        for name in formats:
            key = (model, head, name, [batch, length])
            same = (r for r in found if (r["model"], r["head"], r["format"], r["prefill"]) == key)
            cells.append(_ms(next(same, None)))
        lines.append([f"{model}, head {head}, {batch} x {length}", *cells])
    return table(["sequences x tokens, ms", *formats], lines) if lines else ""


def _proof(rows: list[Row]) -> str:
    compared = [r for r in rows if r.get("logits_equal_composite") is not None]
    equal = sum(row["logits_equal_composite"] for row in compared)
    return (
        f"In {equal} of {len(compared)} cells the logits of w4a8 equalled to the bit those of the "
        "same operations one by one."
    )


def markdown(records: list[dict]) -> str:
    rows = rows_of(records)
    machines = sorted({str(record["machine"].get("gpu")) for record in records})
    commits = sorted({record["commit"][:12] for record in records})
    problems = [problem for record in records for problem in record.get("problems", [])]
    absent = {k: v for record in records for k, v in record["absent"].items()}
    parts = [
        "# Decode steps",
        f"{', '.join(machines)}; commit {', '.join(commits)}; {records[0]['started'][:10]}. "
        "Milliseconds of one step, medians of CUDA graph replays; weights, keys and values are "
        "random. Products of w4a8 get their tokens from fused producers, those of w4a8-linear "
        f"quantize them themselves. {_proof(rows)}",
        *(f"**{problem}**" for problem in problems),
        *(f"Not measured: {name}: {reason}." for name, reason in absent.items()),
        "## The most tokens/s",
        most_table(rows),
    ]
    for (model, layers, kv, head, context), own in groups(rows).items():
        parts.append(f"## {model}, {layers} layers, KV {kv}, head {head}, context {context}")
        parts += [step_table(own), parts_table(own)]
    if prefilled := prefill_table(rows):
        parts += ["## Prefill", prefilled]
    parts += ["## Commands", *(f"`{record['command']}`" for record in records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_plots(rows: list[Row], folder: Path) -> list[Path]:
    """tokens/s by number of sequences, one plot for each group of steps."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .plots import COLOURS, OUR_COLOUR, STYLE, write_figure

    files: list[Path] = []
    with mpl.rc_context(STYLE):
        for (model, layers, kv, head, context), own in groups(rows).items():
            figure = Figure(figsize=(6.4, 4.2), layout="constrained")
            axes = figure.subplots()
            colours = iter(COLOURS)
            for name in _formats(own):
                ok = [r for r in own if r["format"] == name and r["status"] == "ok"]
                points = sorted((row["batch"], row["tokens_per_s"]) for row in ok)
                if points:
                    colour = OUR_COLOUR if name == OURS else next(colours)
                    axes.plot(*zip(*points, strict=True), "o-", label=name, color=colour)
            axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="tokens per second")
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_title(f"{model}, {layers} layers, KV {kv}, head {head}, context {context}")
            axes.legend()
            files += write_figure(figure, folder / f"step_{model}_{layers}_{kv}_{head}")
    return files


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.split("\n", maxsplit=1)[0]

    def plots(records: list[dict], folder: Path) -> list[Path]:
        return write_plots(rows_of(records), folder)

    return command.run("step", about, arguments, read, markdown, plots)
