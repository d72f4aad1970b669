"""The tables of bench quality's results, as Markdown: beside the JSON, and in docs/quality.md."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.machine import ROOT
from .quality_data import HOME, UNSEEN

DOCUMENT = ROOT / "docs" / "quality.md"
END = "<!-- end of tables -->"


def begin(folder: Path) -> str:
    """The line after which the tables of a folder stand in the document."""
    return f"<!-- tables: python -m bench quality --render bench/results/quality/{folder.name} -->"


def render(folder: Path) -> None:
    """Write quality.md beside quality.json, and its tables into docs/quality.md."""
    results = json.loads((folder / "quality.json").read_text())
    content = tables(results, folder)
    (folder / "quality.md").write_text(content + "\n")
    first = begin(folder)
    before, found, rest = DOCUMENT.read_text().partition(first)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise SystemExit(f"{DOCUMENT}: expected the lines {first!r} and {END!r}")
    DOCUMENT.write_text(f"{before}{first}\n{content}\n{END}{after}")


def tables(results: dict, folder: Path) -> str:
    rows = results["rows"]
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    commits = ", ".join(sorted({row["commit"][:12] for row in rows}))
    parts = [
        f"{machines}; commit {commits}. Language models are calibrated on {' and '.join(HOME)}. "
        "Raw figures: "
        f"`bench/results/quality/{folder.name}/quality.json`."
    ]
    for model, processor in dict.fromkeys((row["model"], processor_of(row)) for row in rows):
        own = [row for row in rows if (row["model"], processor_of(row)) == (model, processor)]
        parts.append(language_table(own) if "domains" in own[0] else cosine_table(own))
    return "\n\n".join(parts)


def processor_of(row: dict) -> str:
    """Of the machine that a row was measured on, however many threads it used."""
    return row["machine"].split(", ")[0]


def language_table(rows: list[dict]) -> str:
    domains = (*HOME, UNSEEN)
    reference = ", ".join(
        f"{domain} {rows[0]['domains'][domain]['reference_perplexity']:.2f}" for domain in domains
    )
    has_shares = any("weights_alone" in row for row in rows)
    lines = [
        f"**{rows[0]['model']}** on {processor_of(rows[0])}, perplexity relative to the GGUF "
        f"file's weights in float32 ({reference}); "
        f"agreement of the most likely token and KL divergence on {UNSEEN}, which is unseen; "
        f"{rows[0]['domains'][UNSEEN]['tokens']} tokens judged of each domain; text: tokens for "
        "calibration"
        + (
            "; of activations: what is lost less with the same weights and float activations, on "
            "each domain"
            if has_shares
            else ""
        ),
        "",
        "| recipe | text | bits | "
        + " | ".join(f"{d} (unseen)" if d == UNSEEN else d for d in domains)
        + (" | of activations" if has_shares else "")
        + " | same token | KL mean | KL p99 | time, s | peak, GB |",
        "|---|" + "---:|" * (7 + has_shares + len(domains)),
    ]
    for row in rows:
        change = [
            f"{r['perplexity'] / r['reference_perplexity'] - 1:+.1%}"
            for r in (row["domains"][domain] for domain in domains)
        ]
        unseen = row["domains"][UNSEEN]
        cells = [
            row["recipe"],
            f"{row['calibration_tokens'] // 1024}k",
            f"{row['bits']:.2f}",
            *change,
            *([of_activations(row, domains)] if has_shares else []),
            f"{unseen['agreement']:.1%}",
            f"{unseen['mean_kl']:.4f}",
            f"{unseen['p99_kl']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if "cpu" in row:
            lines += [
                "",
                f'Perplexity of "{row["recipe"]}" on {UNSEEN}: {unseen_perplexity(row):.4f} '
                f"through the kernel, {row['cpu']:.4f} with the whole model on a CPU"
                + (
                    f", {row['cpu_layers']:.4f} with its layers alone there."
                    if "cpu_layers" in row
                    else "."
                ),
            ]
    for row in rows:
        if "perturbed" in row:
            first, *others = row["perturbed"]["perplexities"]
            lines += [
                "",
                f'Perplexity of "{row["recipe"]}" on {row["perturbed"]["tokens"]} tokens of '
                f"{UNSEEN}: {first:.2f}; with embeddings changed by one part in a million, "
                f"{len(others)} times: {', '.join(f'{value:.2f}' for value in others)}.",
            ]
    return "\n".join(lines)


def of_activations(row: dict, domains: tuple[str, ...]) -> str:
    """The points of the loss that rounding the activations adds, where that was measured."""
    if "weights_alone" not in row:
        return ""
    points = [
        (found["perplexity"] - row["weights_alone"][domain]) / found["reference_perplexity"]
        for domain, found in ((domain, row["domains"][domain]) for domain in domains)
    ]
    return ", ".join(f"{100 * point:.1f}" for point in points)


def unseen_perplexity(row: dict) -> float:
    return row["domains"][UNSEEN]["perplexity"]


def cosine_table(rows: list[dict]) -> str:
    lines = [
        f"**{rows[0]['model']}** on {processor_of(rows[0])}, cosine similarity of "
        f"{rows[0]['sentences']} sentence embeddings to those of the float32 model",
        "",
        "| recipe | bits | mean | minimum | time, s | peak, GB |",
        "|---|" + "---:|" * 5,
    ]
    lines += [
        f"| {row['recipe']} | {row['bits']:.2f} | {row['mean']:.5f} | {row['minimum']:.5f} | "
        f"{row['seconds']:.0f} | {row['peak_bytes'] / 1e9:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
