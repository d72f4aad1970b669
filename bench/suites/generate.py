"""What a user of transformers gets: ms per token of ``generate`` with a static cache, compiled.

    python -m bench generate --models llama3-8b --batch 1,16 --json generate.json

Llama models of random weights: in bf16, quantized (w4a8-linear), and quantized and fused (w4a8).
Quantized ones have a head of 8 bits. `bench step` measures the same without transformers, whose
static cache repeats the keys of grouped heads and attends to places that hold nothing yet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import liquidgemm

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_tokens
from ..core.timing import percentile
from ..decoder.sizes import Sizes, parse_models

FORMATS = ("bf16", "w4a8-linear", "w4a8")
WARM = 8  # tokens before those that count: prefill, compilation, capture


class Ticks:
    """A logits processor that notes when each token is there."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self._ticks = on_gpu, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())
        return scores

    def ms(self) -> list[float]:
        """Between one token and the next."""
        pairs = list(zip(self._ticks, self._ticks[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [1e3 * (second - first) for first, second in pairs]


def build(sizes: Sizes, name: str, device: torch.device) -> tuple[nn.Module, str]:
    """A model in a format, and what fuse_ says of it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    said = ""
    if name != "bf16":
        recipe = liquidgemm.LiquidConfig(method="rtn", head="int8")
        liquidgemm.quantize_(model, recipe, progress=False, verify=False)
    if name == "w4a8":
        report = liquidgemm.fuse_(model)
        said = str(report)
        if len(report.fused) != sizes.layers or report.apart:
            raise RuntimeError(said)
    return model, said


def measure(model: Any, batch: int, options: argparse.Namespace) -> dict:
    import transformers

    from liquidgemm.integrations.transformers_cache import LiquidCache

    on_gpu = options.device == "cuda"
    generator = torch.Generator(model.device).manual_seed(1)
    shape = batch, options.context
    ids = torch.randint(1, model.config.vocab_size, shape, generator=generator, device=model.device)
    compiled = {
        "compile_config": transformers.CompileConfig(
            mode="reduce-overhead", fullgraph=True, dynamic=False
        )
    }
    ticks = Ticks(on_gpu)
    cache: dict = {"cache_implementation": "static"}
    model.set_attn_implementation("sdpa" if options.cache == "static" else "liquidgemm")
    if options.cache != "static":
        length = options.context + options.new + WARM
        cache = {
            "past_key_values": LiquidCache(model.config, max_cache_len=length, format=options.cache)
        }
    torch._dynamo.reset()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.new + WARM,
        do_sample=False,
        **cache,
        logits_processor=transformers.LogitsProcessorList([ticks]),
        **(compiled if on_gpu else {"disable_compile": True}),
    )
    times = ticks.ms()[WARM - 1 :]
    return {
        "ms": statistics.median(times),
        "p10_ms": percentile(times, 0.1),
        "p90_ms": percentile(times, 0.9),
        "tokens_per_s": 1e3 * batch / statistics.median(times),
    }


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench generate", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--models", type=argument(parse_models), default="llama3-8b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batch", type=argument(parse_tokens), default="1,16")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompts")
    parser.add_argument("--new", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--cache", default="static", choices=("static", "int8", "int4", "fp8"))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: for tests")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if options.device == "cuda":
        require_gpu(parser)
    device = torch.device(options.device)
    record: dict = {
        "command": machine.command_line("generate", words),
        "commit": options.commit or machine.commit(),
        "started": machine.now(),
        "machine": machine.describe(device) if options.device == "cuda" else {"gpu": None},
        "rows": [],
    }
    for sizes in (whole.with_layers(options.layers) for whole in options.models):
        for name in options.formats:
            model, said = build(sizes, name, device)
            for batch in options.batch:
                row = {"model": sizes.name, "layers": sizes.layers, "format": name, "batch": batch}
                row |= {
                    "context": options.context,
                    "cache": options.cache,
                    "fused": said,
                } | measure(model, batch, options)
                record["rows"].append(row)
                print(
                    f"{sizes.name} {name:12} batch {batch:4} {row['ms']:8.3f} ms per token "
                    f"({row['p10_ms']:.3f} to {row['p90_ms']:.3f}) "
                    f"{row['tokens_per_s']:9.1f} tokens/s",
                    flush=True,
                )
                if options.json:
                    machine.save_json(options.json, record)
            del model
    return 0


if __name__ == "__main__":
    sys.exit(main())
