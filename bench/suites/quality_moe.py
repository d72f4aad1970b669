"""Quality of quantized experts, on a small model that is trained for it on text at hand.

python -m bench quality-moe --out bench/results/quality/DATE     (on a CPU; minutes)
python -m bench quality-moe --render bench/results/quality/DATE  (its table into docs/quality.md)

No small mixture of experts comes with a package, so one is trained: bytes of Python's help topics
(pydoc_data), a byte a token. What is judged is the perplexity of topics that neither training nor
calibration has seen, and of docstrings of the standard library, which are another kind of text.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.evaluate import evaluate, sliding_windows

from ..core.machine import ROOT, commit, save_json

DOCUMENT = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- table: python -m bench quality-moe --render -->", "<!-- end of table -->"
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LENGTH, BATCH, RATE = 192, 12, 3e-3
WINDOW, STRIDE = 256, 128
RECIPES = {
    "rtn": ({"method": "rtn"}, 0),
    "search": ({}, 0),
    "hessian": ({"method": "hessian"}, 32768),
    "gptq": ({"method": "gptq"}, 32768),
    "gptq, little text": ({"method": "gptq"}, 2048),
    "gptq, smooth": ({"method": "gptq", "smooth": True}, 32768),
}


def texts() -> tuple[list[bytes], list[bytes], bytes]:
    """Topics for training and calibration, those for evaluation, and docstrings."""
    from pydoc_data.topics import topics

    documents = [topics[name].encode() for name in sorted(topics)]
    evaluation = documents[::8]
    training = [document for i, document in enumerate(documents) if i % 8]
    docstrings = []
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef))
        docstrings += [text for node in nodes if (text := ast.get_docstring(node))]
    return training, evaluation, "\n\n".join(docstrings).encode()


def tokens_of(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def new_model(**fields) -> nn.Module:
    import transformers

    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG, **fields))


def train(training: list[bytes], steps: int, seed: int = 0) -> dict[str, Tensor]:
    """The state of a trained model."""
    torch.manual_seed(seed)
    model = new_model(router_aux_loss_coef=0.01, output_router_logits=True)
    data = tokens_of(b"\n\n".join(training))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        places = torch.randint(0, len(data) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([data[i : i + LENGTH] for i in places])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            seconds = time.perf_counter() - start
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return model.state_dict()


def windows(text: bytes, count: int) -> list[tuple[Tensor, int]]:
    """Pieces of 1024 bytes, spread evenly, and windows sliding over each."""
    data = tokens_of(text)
    pieces = data[: len(data) // 1024 * 1024].view(-1, 1024)
    chosen = torch.linspace(0, len(pieces) - 1, min(len(pieces), count // 1024)).long()
    return [w for i in chosen for w in sliding_windows(pieces[i], WINDOW, STRIDE)]


def calibration(training: list[bytes], count: int) -> list[Tensor]:
    data = tokens_of(b"\n\n".join(training))
    pieces = data[: len(data) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.linspace(0, len(pieces) - 1, count // WINDOW).long()
    return list(pieces[chosen].split(4))


def measure(model: nn.Module, training: list[bytes], judged: dict) -> list[dict]:
    float_perplexity = {name: evaluate(model, w).perplexity for name, w in judged.items()}
    rows = [{"recipe": "float", "perplexity": float_perplexity}]
    for recipe, (fields, count) in RECIPES.items():
        quantized = copy.deepcopy(model)
        data = calibration(training, count) if count else None
        start = time.perf_counter()
        config = LiquidConfig(**fields, gate="off")
        report = quantize_(quantized, config, calibration=data, progress=False)
        row = {"recipe": recipe, "calibration_tokens": count}
        row["seconds"] = time.perf_counter() - start
        counts = sorted(n for experts in report.experts.values() for n in experts.tokens)
        row["tokens_per_expert"] = [counts[0], counts[len(counts) // 2], counts[-1]]
        row["fell_back"] = sum(len(experts.fell_back) for experts in report.experts.values())
        found = {name: evaluate(quantized, w, model) for name, w in judged.items()}
        row["perplexity"] = {name: result.perplexity for name, result in found.items()}
        row["mean_kl"] = {name: result.mean_kl for name, result in found.items()}
        rows.append(row)
        print(recipe, row["perplexity"], row["mean_kl"], f"{row['seconds']:.0f} s", flush=True)
    return rows


def table(results: dict) -> str:
    first, *rows = results["rows"]
    names = list(first["perplexity"])
    reference = ", ".join(f"{name} {first['perplexity'][name]:.3f}" for name in names)
    lines = [
        f"{results['machine']}; commit {results['commit'][:12]}; {results['steps']} steps of "
        f"training. Perplexity of a byte relative to the float model ({reference}), and mean KL "
        "divergence from it; tokens per expert: least, median, most.",
        "",
        "| recipe | text | "
        + " | ".join(f"{name} | KL" for name in names)
        + " | tokens per expert | fell back | time, s |",
        "|---|" + "---:|" * (4 + 2 * len(names)),
    ]
    for row in rows:
        change = []
        for name in names:
            relative = row["perplexity"][name] / first["perplexity"][name] - 1
            change += [f"{relative:+.2%}", f"{row['mean_kl'][name]:.5f}"]
        count = row["calibration_tokens"]
        spread = " / ".join(map(str, row["tokens_per_expert"])) if count else ""
        cells = [row["recipe"], f"{count // 1024}k" if count else "", *change, spread]
        cells += [str(row["fell_back"]), f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(folder: Path) -> None:
    """Write the table of a folder's results into docs/quality.md."""
    content = table(json.loads((folder / "quality_moe.json").read_text()))
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT}: expected the lines {BEGIN!r} and {END!r}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("quality-moe"), help="for the results")
    parser.add_argument("--steps", type=int, default=350, help="of training")
    parser.add_argument("--model", type=Path, help="a file to keep the trained model in")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of each kind of text")
    parser.add_argument("--render", type=Path, help="write the table of such a folder")
    arguments = parser.parse_args(arguments)
    if arguments.render is not None:
        render(arguments.render)
        return
    training, evaluation, docstrings = texts()
    judged = {
        "other topics": windows(b"\n\n".join(evaluation), arguments.eval_tokens),
        "docstrings": windows(docstrings, arguments.eval_tokens),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.model
    if kept is not None and kept.exists():
        state = torch.load(kept)
    else:
        state = train(training, arguments.steps)
        if kept is not None:
            torch.save(state, kept)
    model = new_model().eval()
    model.load_state_dict(state)
    rows = measure(model, training, judged)
    if not math.isfinite(rows[0]["perplexity"]["other topics"]):
        raise SystemExit("training has diverged")
    threads = torch.get_num_threads()
    results = {
        "rows": rows,
        "steps": arguments.steps,
        "config": CONFIG,
        "commit": commit(),
        "machine": f"{platform.machine()}, {threads} threads",
    }
    save_json(arguments.out / "quality_moe.json", results)
    print(table(results))
