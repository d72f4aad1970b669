"""What a quantized KV cache costs in quality: perplexity, and facts found in a long text.

python -m bench quality-data DATA
python -m bench kv-quality DATA --out bench/results/quality/DATE    (a GPU is used if there is one)
python -m bench kv-quality --render bench/results/quality/DATE      (its table into docs/quality.md)

The models are those of bench quality, with the GGUF file's weights in float32. Every token attends
to keys and values as the cache holds them, its own included, with its query rounded as the kernel
rounds it: what decoding token by token computes, in one pass. Keys of int8 and int4 are centered on
the mean of the first PROMPT.

Facts: "The access code of NAME is NUMBER." is planted for several names in thousands of tokens of
the unseen domain, evenly, and all are asked for at the end. A fact is found if each token of the
number is the most likely one, given those before it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from liquidgemm.checkpoints.sources import load_model
from liquidgemm.kv._ops import query_rows
from liquidgemm.kv.format import FORMATS, Format, dequantize, quantize
from liquidgemm.quantization.evaluate import evaluate

from ..core.machine import ROOT, commit, save_json
from .quality import MODELS, Reference, machine, windows
from .quality_data import HOME, MINILM, UNSEEN, read_texts

LANGUAGE_MODELS = [name for name, file in MODELS.items() if file != MINILM]
KINDS = [name for name in FORMATS if name != "float16"]
NAMES = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Ginkgo", "Hazel")
PROMPT = 64
DOCUMENT = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- kv: python -m bench kv-quality --render -->", "<!-- end of kv -->"


class Attention:
    """Causal attention as a cache of a format gives it; None leaves all as it is."""

    fmt: Format | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        if self.fmt is not None:
            center = key[:, :, :PROMPT].mean(2, keepdim=True) if self.fmt.params else 0
            key = dequantize(*quantize(key - center, self.fmt, False), self.fmt, False) + center
            value = dequantize(*quantize(value, self.fmt, True), self.fmt, True)
            query = query_rows(query, self.fmt)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None


ATTENTION = Attention()
AttentionInterface.register("bench_kv", ATTENTION)


def planted(tokenizer, texts: list[str], tokens: int, seed: int) -> tuple[Tensor, list[slice]]:
    """A text of about so many tokens with all facts, then the questions; where the answers are."""
    chooser = random.Random(seed)
    codes = {name: str(chooser.randrange(10_000, 100_000)) for name in NAMES}
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    start = chooser.randrange(max(1, len(ids) - tokens))
    piece = tokens // (len(NAMES) + 1)
    prompt: list[int] = []
    for i, name in enumerate(chooser.sample(NAMES, len(NAMES))):
        prompt += ids[start + i * piece : start + (i + 1) * piece]
        fact = f"\nThe access code of {name} is {codes[name]}.\n"
        prompt += tokenizer(fact, add_special_tokens=False)["input_ids"]
    prompt += ids[start + len(NAMES) * piece : start + (len(NAMES) + 1) * piece]
    answers = []
    for name in chooser.sample(NAMES, len(NAMES)):
        question = f"\nThe access code of {name} is"
        prompt += tokenizer(question, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {codes[name]}", add_special_tokens=False)["input_ids"]
        answers.append(slice(len(prompt), len(prompt) + len(answer)))
        prompt += [*answer, *tokenizer(".", add_special_tokens=False)["input_ids"]]
    return torch.tensor([prompt]), answers


@torch.no_grad()
def facts_found(model: nn.Module, documents: list[tuple[Tensor, list[slice]]]) -> int:
    found = 0
    head = model.get_output_embeddings()
    for ids, answers in documents:
        hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state[0]
        for answer in answers:
            likely = head(hidden[answer.start - 1 : answer.stop - 1]).argmax(-1)
            found += int(torch.equal(likely.cpu(), ids[0, answer]))
    return found


def measure(name: str, arguments: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load_model(
        str(arguments.data / MODELS[name]), arguments.device, torch.float32
    )
    model.set_attn_implementation("bench_kv")
    ATTENTION.fmt = None
    reference = Reference(model)
    texts = {
        domain: windows(
            tokenizer, read_texts(arguments.data, domain, "evaluation"), arguments.eval_tokens
        )
        for domain in (*HOME, UNSEEN)
    }
    unseen = read_texts(arguments.data, UNSEEN, "evaluation")
    documents = {
        length: [planted(tokenizer, unseen, length, seed) for seed in range(arguments.documents)]
        for length in arguments.lengths
    }
    for kind in ("float32", *KINDS):
        ATTENTION.fmt = FORMATS.get(kind)
        facts = {length: facts_found(model, some) for length, some in documents.items()}
        row = {
            "model": name,
            "format": kind,
            "facts": facts,
            "facts_asked": arguments.documents * len(NAMES),
        }
        if kind == "float32":  # fills the reference's hidden states, with attention as it is
            for some in texts.values():
                for ids, _ in some:
                    reference(ids.to(arguments.device))
        else:
            results = {domain: evaluate(model, w, reference) for domain, w in texts.items()}
            row["domains"] = {domain: asdict(result) for domain, result in results.items()}
        yield row


def line(row: dict) -> str:
    found = "  ".join(f"{n} of {row['facts_asked']} at {t}" for t, n in row["facts"].items())
    changes = "  ".join(
        f"{d} {r['perplexity'] / r['reference_perplexity'] - 1:+.2%} (KL {r['mean_kl']:.4f})"
        for d, r in row.get("domains", {}).items()
    )
    return f"{row['model']:20} {row['format']:9} facts {found}  {changes}"


def table(results: dict, folder: Path) -> str:
    rows = results["rows"]
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    parts = [
        f"{machines}; commit {', '.join(sorted({row['commit'][:12] for row in rows}))}. Raw "
        f"figures: [{folder.name}/kv.json](../bench/results/quality/{folder.name}/kv.json)."
    ]
    domains = (*HOME, UNSEEN)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lengths = list(own[0]["facts"])
        lines = [
            f"**{model}**, perplexity relative to a float32 cache; agreement of the most likely "
            f"token and KL divergence on {UNSEEN}; facts found, of {own[0]['facts_asked']}, by "
            "tokens of the text",
            "",
            "| cache | "
            + " | ".join((*domains, "same token", "KL mean", *(f"facts, {n}" for n in lengths)))
            + " |",
            "|---|" + "---:|" * (len(domains) + 2 + len(lengths)),
        ]
        for row in own:
            cells = [row["format"]]
            if "domains" in row:
                cells += [
                    f"{r['perplexity'] / r['reference_perplexity'] - 1:+.2%}"
                    for r in (row["domains"][domain] for domain in domains)
                ]
                unseen = row["domains"][UNSEEN]
                cells += [f"{unseen['agreement']:.1%}", f"{unseen['mean_kl']:.4f}"]
            else:
                cells += [""] * (len(domains) + 2)
            cells += [str(row["facts"][length]) for length in lengths]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def render(folder: Path) -> None:
    """Write the tables of kv.json into docs/quality.md."""
    content = table(json.loads((folder / "kv.json").read_text()), folder)
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT}: expected the lines {BEGIN!r} and {END!r}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench kv-quality", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("data", type=Path, nargs="?", help="folder of bench quality-data")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for kv.json")
    parser.add_argument("--models", nargs="+", choices=LANGUAGE_MODELS, default=LANGUAGE_MODELS)
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each domain")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 6144], help="tokens")
    parser.add_argument("--documents", type=int, default=8, help="of each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="commit that is measured, where git is not at hand")
    parser.add_argument("--render", type=Path, help="write the table of such a folder")
    options = parser.parse_args(arguments)
    if options.render is not None:
        render(options.render)
        return
    if options.data is None:
        parser.error("expected DATA or --render")
    path = options.out / "kv.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    run = {"commit": options.commit or commit(), "machine": machine(options.device)}
    for name in options.models:
        for row in measure(name, options):
            print(line(row), flush=True)
            kept = [one for one in rows if (one["model"], one["format"]) != (name, row["format"])]
            rows = [*kept, json.loads(json.dumps(row | run))]
            order = [(m, k) for m in LANGUAGE_MODELS for k in ("float32", *KINDS)]
            rows.sort(key=lambda one: order.index((one["model"], one["format"])))
            save_json(path, {"rows": rows})


if __name__ == "__main__":
    main()
