"""Whole models in vLLM: bf16, FP8, humming's W4A8 and ours, through the same engine.

    python -m bench serve --models llama3-8b --json serve.json
    python -m bench serve --formats fp8,w4a8 --batch 1,64 --budget 300 --json serve.json

Weights are random, in the sizes of well-known models; ours are codes as a checkpoint of ours would
bring them, served by the plug-in. Each format gets a process of its own, in which `LLM.generate`
answers so many requests at once:

- prefill: one token each, the time of the fastest of three turns;
- a decode step: (the time for n + 1 tokens - the time for one) / n, likewise.

With prefix caching off, and one KV cache dtype for all. The record says which class computes the
layers and how many bytes they take, so that no format can run as another without being seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument
from ..decoder.sizes import MODELS, Sizes, parse_models
from .step import parse_batches

SCHEMA = 1
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
HUMMING = {
    "HUMMING_COMPILER": "nvcc",
    "VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype": "int8"}',
    "VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "int4", "group_size": 128}',
}
# How each is asked for, and the bytes that a weight takes at most, by which it is known.
FORMATS: dict[str, tuple[str | None, float]] = {
    "bf16": (None, 2.01),
    "fp8": ("fp8", 1.01),
    "humming": ("humming", 0.7),
    "w4a8": ("liquidgemm", 0.6),
}
TURNS = 3


def parse_formats(text: str) -> list[str]:
    """Names of FORMATS. Raises a ValueError for others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name not in FORMATS for name in names):
        raise ValueError(f"expected formats among {', '.join(FORMATS)}, got {text!r}")
    return names


def config_of(sizes: Sizes, name: str) -> dict:
    """The ``config.json`` of a Llama."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if name == "w4a8":
        parts = [f"self_attn.{part}_proj" for part in "qkvo"]
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        layers = {f"model.layers.{i}.{part}": 0 for i in range(sizes.layers) for part in parts}
        config["quantization_config"] = {
            "quant_method": "liquidgemm",
            "format_version": 1,
            "config": None,
            "layers": layers,
        }
    return config


class Engine:
    """An engine with random weights of a format, in this process."""

    def __init__(self, sizes: Sizes, name: str, options: argparse.Namespace) -> None:
        from vllm import LLM

        from liquidgemm.integrations.vllm import register

        register()  # vLLM finds an installed package by itself
        most = max(options.batch)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(config_of(sizes, name)))
        on_gpu = options.device == "cuda"
        more = {"quantization": FORMATS[name][0]} if name != "w4a8" and FORMATS[name][0] else {}
        if on_gpu:
            more["gpu_memory_utilization"] = 0.88
            more["compilation_config"] = {"cudagraph_capture_sizes": sorted(set(options.batch))}
        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=options.tokens + max(options.steps, 8) + 8,
            max_num_seqs=most,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            kv_cache_dtype=options.kv,
            enforce_eager=not on_gpu,
            disable_log_stats=True,
            **more,
        )
        self.started = time.perf_counter() - start
        self.vocabulary = sizes.vocabulary

    def layers(self) -> dict:
        """What computes the linear layers, and the bytes per weight that they take."""
        return self.llm.apply_model(_layers)[0]

    def kv_tokens(self) -> int:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def seconds(self, batch: int, tokens_in: int, tokens_out: int) -> float:
        """Of one turn; the fastest of several is asked for by `best`."""
        from vllm import SamplingParams

        numbers = random.Random(batch)
        prompts = [
            {"prompt_token_ids": [numbers.randrange(3, self.vocabulary) for _ in range(tokens_in)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=tokens_out,
            min_tokens=tokens_out,
            ignore_eos=True,
            detokenize=False,
        )
        _wait()
        start = time.perf_counter()
        results = self.llm.generate(prompts, sampling, use_tqdm=False)
        _wait()
        took = time.perf_counter() - start
        if [len(result.outputs[0].token_ids) for result in results] != [tokens_out] * batch:
            raise RuntimeError(f"expected {tokens_out} tokens of each of {batch}, got others")
        return took

    def best(self, batch: int, tokens_in: int, tokens_out: int, turns: int = TURNS) -> float:
        return min(self.seconds(batch, tokens_in, tokens_out) for _ in range(turns))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _layers(model: torch.nn.Module) -> dict:
    """Run by the engine where the model is."""
    methods, held, weights = set(), 0, 0
    for module in model.modules():
        if hasattr(module, "quant_method") and hasattr(module, "input_size_per_partition"):
            name = type(module.quant_method).__name__
            if "Embedding" in name:
                continue
            methods.add(name)
            held += sum(p.nbytes for p in module.parameters())
            weights += module.input_size_per_partition * module.output_size_per_partition
    return {"methods": sorted(methods), "bytes_per_weight": held / max(weights, 1)}


def measure(sizes: Sizes, name: str, options: argparse.Namespace) -> dict:
    """All of one format, in this process."""
    deadline = time.monotonic() + options.budget
    engine = Engine(sizes, name, options)
    row = {"model": sizes.name, "layers": sizes.layers, "format": name, "kv": options.kv}
    row |= {"started_s": engine.started, "kv_tokens": engine.kv_tokens(), **engine.layers()}
    row |= {"tokens_in": options.tokens, "steps": [], "status": "ok"}
    if row["bytes_per_weight"] > FORMATS[name][1]:
        row |= {"status": "failed", "reason": f"it is not {name}: {engine.layers()}"}
        return row
    engine.seconds(1, min(64, options.tokens), 8)
    for batch in options.batch:
        if time.monotonic() > deadline:
            row["reason"] = f"the budget ended before a batch of {batch}"
            break
        prefill = engine.best(batch, options.tokens, 1)
        whole = engine.best(batch, options.tokens, 1 + options.steps, TURNS - 1)
        row["steps"].append(
            {
                "batch": batch,
                "prefill_s": prefill,
                "step_ms": (whole - prefill) / options.steps * 1e3,
                "tokens_per_s": batch * (options.steps + 1) / whole,
            }
        )
        print(line(row, row["steps"][-1]), flush=True)
    return row


def line(row: dict, step: dict) -> str:
    return (
        f"  {row['model']:11} {row['format']:8} kv {row['kv']:5} batch {step['batch']:4} "
        f"step {step['step_ms']:8.3f} ms  prefill {step['prefill_s']:8.4f} s  "
        f"{step['tokens_per_s']:8.0f} tokens/s"
    )


def in_a_process(sizes: Sizes, name: str, options: argparse.Namespace, words: list[str]) -> dict:
    """`measure` in a process of its own, which ends with what it holds of the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "row.json"
        command = [sys.executable, "-m", "bench", "serve", *words]
        command += ["--models", sizes.name, "--formats", name, "--part", str(part)]
        environment = os.environ | ENVIRONMENT | (HUMMING if name == "humming" else {})
        try:
            done = subprocess.run(
                command,
                cwd=machine.ROOT,
                env=environment,
                timeout=options.budget + 240,
                check=False,
            )
            ended = f"it ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "it did not end in time"
        if part.exists():
            return json.loads(part.read_text())
    return {"model": sizes.name, "format": name, "status": "failed", "reason": ended, "steps": []}


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=argument(parse_models), default="llama3-8b")
    parser.add_argument("--formats", type=argument(parse_formats), default=",".join(FORMATS))
    parser.add_argument("--batch", type=argument(parse_batches), default="1,16,64,128,256")
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt (default 512)")
    parser.add_argument("--steps", type=int, default=128, help="decode steps (default 128)")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache, as vLLM names it")
    parser.add_argument("--budget", type=float, default=600, help="seconds for each format")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: for tests")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if "max" in options.batch:
        parser.error("--batch: expected numbers, got max")
    for name in ("tokens", "steps", "layers"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: expected 1 or more, got {value}")
    if options.device == "cuda":
        require_gpu(parser)
    models = [MODELS[sizes.name].with_layers(options.layers) for sizes in options.models]
    if options.part:
        row = measure(models[0], options.formats[0], options)
        machine.save_json(options.part, row)
        return 0
    device = torch.device(options.device)
    record = {
        "schema": SCHEMA,
        "command": machine.command_line("serve", words),
        "commit": options.commit or machine.commit(),
        "started": machine.now(),
        "machine": machine.describe(device) if options.device == "cuda" else {"gpu": None},
        "protocol": {"tokens": options.tokens, "steps": options.steps, "turns": TURNS},
        "rows": [],
    }
    for sizes in models:
        for name in options.formats:
            row = in_a_process(sizes, name, options, words)
            record["rows"].append(row)
            print(
                f"{row['model']} {name}: {row['status']} {row.get('reason', '')} started in "
                f"{row.get('started_s', 0):.0f} s, {row.get('bytes_per_weight', 0):.2f} bytes per "
                f"weight by {', '.join(row.get('methods', []))}, KV cache of "
                f"{row.get('kv_tokens', 0)} tokens",
                flush=True,
            )
            record["finished"] = machine.now()
            if options.json:
                machine.save_json(options.json, record)
    return 1 if any(row["status"] != "ok" for row in record["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
