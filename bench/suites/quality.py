"""Every method of quantization on real models: perplexity, agreement, time, memory.

python -m bench quality-data DATA
python -m bench quality DATA --out bench/results/quality/DATE     (a GPU is used if there is one)
python -m bench quality --render bench/results/quality/DATE       (its tables into docs/quality.md)

Language models are calibrated on the home domains and judged on other documents of those, and on a
domain that calibration has never seen. Baseline are the weights of the GGUF file, 4 to 8 bits
themselves, expanded to float32: what is lost is lost in addition. MiniLM, which comes in float32,
is calibrated on 1000 sentences of the home domains and judged by the cosine similarity of as many
embeddings of the unseen one.

What is judged are the real layers: the kernel on a GPU, else the CPU's exact path. With --cpu-too a
recipe is judged on both: with the layers alone on the CPU, and with the whole model there.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from liquidgemm import LiquidConfig, LiquidLinear, dequantize_, quantize_
from liquidgemm.checkpoints.sources import load_model
from liquidgemm.quantization.calibration.data import token_windows
from liquidgemm.quantization.evaluate import Evaluation, evaluate, sliding_windows

from ..core.machine import commit, save_json
from .quality_data import HOME, MINILM, QWEN, SMOLLM2, UNSEEN, read_texts
from .quality_tables import processor_of, render

WINDOW, STRIDE = 1024, 512
BATCH = 2  # windows of calibration text at a time
SENTENCES = 1000
PERTURBATIONS = 4
MODELS = {"SmolLM2-135M": SMOLLM2, "Qwen2.5-Coder-0.5B": QWEN, "MiniLM-L6": MINILM}

_GPTQ = {"method": "gptq"}
_SMOOTH = {"method": "gptq", "smooth": True}
_DOWN = {"keep": ("down_proj",)}
# The keys and values of grouped heads are small, and all their query heads depend on them.
_DOWN_KV = {"keep": ("down_proj", "k_proj", "v_proj")}
RECIPES = {
    "head int8, all else in floats": {"skip": ("layers.*",), "head": "int8"},
    "W8A8": {"keep": ("*",)},
    "W8A8, smooth": {"keep": ("*",), "smooth": True},
    "W8A8, head int8": {"keep": ("*",), "head": "int8"},
    "rtn": {"method": "rtn"},
    "search": {},
    "search, head int8": {"head": "int8"},
    "search, rotate": {"rotate": True},
    "hessian": {"method": "hessian"},
    "gptq": _GPTQ,
    "gptq, smooth": _SMOOTH,
    "gptq, smooth, rotate": {**_SMOOTH, "rotate": True},
    "search, groups of 32": {"group_size": 32},
    "gptq, smooth, groups of 32": {**_SMOOTH, "group_size": 32},
    "search, 6 bits": {"bits": {"*": 6}},
    "gptq, smooth, 6 bits": {**_SMOOTH, "bits": {"*": 6}},
    "gptq, smooth, budget 5": {**_SMOOTH, "budget": 5.0},
    "gptq, smooth, budget 6": {**_SMOOTH, "budget": 6.0},
    "gptq, smooth, augment 64": {**_SMOOTH, "augment": 64},
    "gptq, smooth, augment 128": {**_SMOOTH, "augment": 128},
    "gptq, smooth, keep down_proj": {**_SMOOTH, **_DOWN},
    "gptq, smooth, augment 64, keep down_proj": {**_SMOOTH, **_DOWN, "augment": 64},
    "gptq, smooth, augment 128, keep down_proj": {**_SMOOTH, **_DOWN, "augment": 128},
    "gptq, smooth, augment 128 shared, keep down_proj": {
        **_SMOOTH,
        **_DOWN,
        "augment": 128,
        "share_columns": True,
    },
    "gptq, smooth, augment 128, keep down, k, v_proj": {**_SMOOTH, **_DOWN_KV, "augment": 128},
    "gptq, smooth, augment 256, keep down, k, v_proj": {**_SMOOTH, **_DOWN_KV, "augment": 256},
    "gptq, smooth, tune": {**_SMOOTH, "tune": 60},
    "gptq, smooth, tune 200": {**_SMOOTH, "tune": 200},
    "gptq, smooth, distill": {**_SMOOTH, "distill": 100},
    "gptq, smooth, tune, distill": {**_SMOOTH, "tune": 60, "distill": 100},
    "gptq, smooth, tune 200, distill": {**_SMOOTH, "tune": 200, "distill": 100},
    "gptq, smooth, augment 128, keep down, k, v_proj, tune": {
        **_SMOOTH,
        **_DOWN_KV,
        "augment": 128,
        "tune": 60,
    },
}
# A norm at the end of a branch feeds the residual stream too: of BERT values alone can be smoothed.
MINILM_RECIPES = {
    name: fields for name, fields in RECIPES.items() if "rotate" not in name and "down" not in name
} | {
    "gptq, augment 64": {**_GPTQ, "augment": 64},
    "gptq, augment 128": {**_GPTQ, "augment": 128},
    "gptq, keep value, attention.output.dense": {
        **_GPTQ,
        "keep": ("value", "attention.output.dense"),
    },
    "gptq, augment 128, keep value, output.dense": {
        **_GPTQ,
        "augment": 128,
        "keep": ("value", "output.dense"),
    },
}


class Reference(nn.Module):
    """The float model; the last hidden state of each window is computed once and kept."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._hidden: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._hidden:
            self._hidden[key] = self._model.base_model(input_ids).last_hidden_state.cpu()
        hidden = self._hidden[key].to(input_ids.device)
        return SimpleNamespace(logits=self._model.get_output_embeddings()(hidden))


class Judge:
    """A language model on every domain, beside its float reference."""

    def __init__(self, folder: Path, model: nn.Module, tokenizer, tokens: int) -> None:
        self._reference = Reference(model)
        self._windows = {
            domain: windows(tokenizer, read_texts(folder, domain, "evaluation"), tokens)
            for domain in (*HOME, UNSEEN)
        }

    def __call__(self, model: nn.Module) -> dict[str, Evaluation]:
        return {domain: evaluate(model, w, self._reference) for domain, w in self._windows.items()}

    def unseen(self, model: nn.Module) -> Evaluation:
        """On the unseen domain, without the reference."""
        return evaluate(model, self._windows[UNSEEN])

    @torch.no_grad()
    def perturbed(self, model: nn.Module) -> dict:
        """Perplexities on the unseen domain: as it is, then with embeddings changed by 1e-6."""
        weight = model.get_input_embeddings().weight
        kept = weight.clone()
        results = [self.unseen(model)]
        for seed in range(PERTURBATIONS):
            generator = torch.Generator(weight.device).manual_seed(seed + 1)
            noise = torch.randn(kept.shape, generator=generator, device=weight.device)
            weight.copy_(kept * (1 + 1e-6 * noise))
            results.append(self.unseen(model))
        weight.copy_(kept)
        return {
            "tokens": results[0].tokens,
            "perplexities": [result.perplexity for result in results],
        }


def windows(tokenizer, texts: list[str], tokens: int) -> list[tuple[Tensor, int]]:
    """Pieces of four windows each, spread evenly over the texts, and windows sliding over each."""
    pieces = token_windows(texts, tokenizer, 4 * WINDOW, tokens)
    return [w for piece in pieces for w in sliding_windows(piece[0], WINDOW, STRIDE)]


def language_model(name: str, arguments: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load_model(
        str(arguments.data / MODELS[name]), arguments.device, torch.float32
    )
    per_domain = [
        token_windows(
            read_texts(arguments.data, domain, "calibration"),
            tokenizer,
            WINDOW,
            arguments.tokens // len(HOME),
        )
        for domain in HOME
    ]
    mixed = torch.cat([w for group in zip(*per_domain, strict=False) for w in group])
    calibration = list(mixed.split(BATCH))
    judge = Judge(arguments.data, model, tokenizer, arguments.eval_tokens)
    for recipe, fields in chosen(RECIPES, arguments).items():
        config = LiquidConfig(**fields, gate="off")
        quantized, row = measured(model, config, calibration, arguments)
        results = judge(quantized)
        row |= {"model": name, "recipe": recipe, "calibration_tokens": mixed.numel()}
        row["domains"] = {domain: asdict(result) for domain, result in results.items()}
        if arguments.weights_alone:
            alone = judge(dequantize_(copy.deepcopy(quantized), torch.float32))
            row["weights_alone"] = {domain: result.perplexity for domain, result in alone.items()}
        if recipe == arguments.perturb:
            row["perturbed"] = judge.perturbed(quantized)
        if recipe == arguments.cpu_too:
            with layers_on_cpu(quantized):
                row["cpu_layers"] = judge.unseen(quantized).perplexity
            row["cpu"] = judge.unseen(quantized.cpu()).perplexity
        yield row


def measured(
    model: nn.Module, config: LiquidConfig, calibration: list, arguments: argparse.Namespace
) -> tuple[nn.Module, dict]:
    """A quantized copy of the model, and what it took: time, and memory beside the model itself."""
    quantized = copy.deepcopy(model)
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of Linux: sets VmHWM to what is in use
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    start = time.perf_counter()
    report = quantize_(
        quantized,
        config,
        calibration=calibration if config.needs_calibration else None,
        progress=False,
    )
    if on_gpu:
        torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before
    weights = sum(m.in_features * m.out_features for m in linears(quantized))
    return quantized, {
        "config": json.loads(config.to_json()),
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak,
        "bits": 8 * report.bytes_after / weights,
        "worst": [(layer.name, layer.output_error) for layer in worst(report)],
    }


def resident(line: str) -> int:
    """Memory of this process in bytes, now (VmRSS) or at its peak (VmHWM)."""
    kilobytes = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes[1])


@contextmanager
def layers_on_cpu(model: nn.Module) -> Iterator[None]:
    """Quantized layers compute on the CPU meanwhile, and everything else where it did.

    What a whole model makes of the same bits depends on everything else, too.
    """
    device = next(model.parameters()).device
    hooks = []
    for layer in linears(model):
        layer.cpu()
        hooks += [
            layer.register_forward_pre_hook(lambda _, inputs: tuple(x.cpu() for x in inputs)),
            layer.register_forward_hook(lambda _, inputs, y: y.to(device)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(device)


def linears(model: nn.Module) -> list[LiquidLinear]:
    return [module for module in model.modules() if isinstance(module, LiquidLinear)]


def worst(report) -> list:
    layers = [layer for layer in report.layers if layer.output_error is not None]
    return sorted(layers, key=lambda layer: -layer.output_error)[:5]


def embeddings(arguments: argparse.Namespace) -> Iterator[dict]:
    from transformers import AutoModel, AutoTokenizer

    folder = arguments.data / MINILM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(arguments.device)

    def batches(domain: str, use: str, count: int) -> list[dict[str, Tensor]]:
        sentences = [
            sentence.strip()
            for text in read_texts(arguments.data, domain, use)
            for sentence in text.replace("\n", " ").split(". ")
            if 40 <= len(sentence) <= 400
        ]
        step = max(1, len(sentences) // count)
        chosen = sorted(sentences[::step][:count], key=len)
        return [
            dict(tokenizer(chosen[i : i + 50], padding=True, truncation=True, return_tensors="pt"))
            for i in range(0, len(chosen), 50)
        ]

    @torch.no_grad()
    def embed(model: nn.Module) -> Tensor:
        rows = []
        for batch in unseen:
            inputs = {key: value.to(arguments.device) for key, value in batch.items()}
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            rows.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(rows)

    calibration = [
        batch for domain in HOME for batch in batches(domain, "calibration", SENTENCES // len(HOME))
    ]
    unseen = batches(UNSEEN, "evaluation", SENTENCES)
    expected = embed(model)
    for recipe, fields in chosen(MINILM_RECIPES, arguments).items():
        config = LiquidConfig(**fields, gate="off")
        quantized, row = measured(model, config, calibration, arguments)
        similarity = torch.cosine_similarity(embed(quantized), expected)
        row |= {"model": "MiniLM-L6", "recipe": recipe, "sentences": len(similarity)}
        row |= {"mean": similarity.mean().item(), "minimum": similarity.min().item()}
        yield row


def chosen(recipes: dict, arguments: argparse.Namespace) -> dict:
    wanted = recipes if arguments.recipes is None else arguments.recipes
    return {
        name: recipes[name] for name in wanted if name in recipes and name not in arguments.done
    }


def line(row: dict) -> str:
    if "domains" in row:
        results = "  ".join(
            f"{d} {r['perplexity'] / r['reference_perplexity'] - 1:+.2%}"
            for d, r in row["domains"].items()
        )
    else:
        results = f"cosine mean {row['mean']:.5f} minimum {row['minimum']:.5f}"
    return (
        f"{row['model']:20} {row['recipe']:53} {row['bits']:.2f} bits  {results}  "
        f"{row['seconds']:.0f} s  {row['peak_bytes'] / 1e9:.2f} GB"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder of bench quality-data")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for the results")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--recipes", nargs="+", choices={**RECIPES, **MINILM_RECIPES}, metavar="RECIPE"
    )
    parser.add_argument("--missing", action="store_true", help="only what quality.json lacks")
    parser.add_argument("--tokens", type=int, default=65536, help="for calibration")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each domain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-too", choices=RECIPES, metavar="RECIPE", help="to judge on both")
    parser.add_argument(
        "--perturb", choices=RECIPES, metavar="RECIPE", help="to judge with rounding errors, too"
    )
    parser.add_argument("--weights-alone", action="store_true", help="judge float activations, too")
    parser.add_argument("--commit", help="commit that is measured, where git is not at hand")
    parser.add_argument("--render", type=Path, help="write the tables of such a folder")
    arguments = parser.parse_args(arguments)
    if arguments.render is not None:
        render(arguments.render)
        return
    if arguments.data is None:
        parser.error("expected DATA or --render")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "quality.json"
    results = {"rows": []}
    run = {"commit": arguments.commit or commit(), "machine": machine(arguments.device)}
    if path.exists():  # models may be measured one at a time
        results["rows"] = json.loads(path.read_text())["rows"]
    for name in arguments.models:
        arguments.done = {
            row["recipe"] for row in results["rows"] if arguments.missing and row["model"] == name
        }
        rows = embeddings(arguments) if name == "MiniLM-L6" else language_model(name, arguments)
        for row in rows:
            row.update(run)
            print(line(row), flush=True)
            by_place = {place(one): one for one in [*results["rows"], row]}
            results["rows"] = [by_place[key] for key in sorted(by_place)]
            save_json(path, results)


def place(row: dict) -> tuple[int, str, int]:
    """Of a row in the tables, whenever it was measured."""
    recipes = MINILM_RECIPES if row["model"] == "MiniLM-L6" else RECIPES
    model, recipe = list(MODELS).index(row["model"]), list(recipes).index(row["recipe"])
    return model, processor_of(row), recipe


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
