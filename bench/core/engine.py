"""vLLM with random weights of a format, and the clock of its steps."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ..decoder.sizes import Sizes

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
    "w4a8": (None, 0.6),
    "w4a8-head": (None, 0.6),
    "w4a8-apart": (None, 0.6),
}
TURNS = 3
BLOCK = 16  # tokens of a block of vLLM's KV cache


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
    if name.startswith("w4a8"):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"]
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        layers = {f"model.layers.{i}.{part}": 0 for i in range(sizes.layers) for part in parts}
        if name == "w4a8-head":
            layers["lm_head"] = sizes.hidden  # as many residual columns as features: 8 bits
        config["quantization_config"] = {
            "quant_method": "liquidgemm",
            "format_version": 1,
            "config": None,
            "layers": layers,
        }
    return config


def tokens_out(batch: int, options: argparse.Namespace) -> int:
    """What each request is asked for: the first get tokens while the last are prefilled."""
    meanwhile = math.ceil(batch * options.tokens / (options.batched_tokens - batch))
    return meanwhile + options.steps + 2


def kv_bytes(sizes: Sizes, options: argparse.Namespace) -> int:
    """Room for the largest of the batches, and a little."""
    blocks = max(
        batch * math.ceil((options.tokens + tokens_out(batch, options)) / BLOCK)
        for batch in options.batch
    )
    blocks = max(blocks, math.ceil(options.prompt / BLOCK)) + 64
    return blocks * BLOCK * sizes.kv_values * (1 if options.kv.startswith("fp8") else 2)


@dataclass(frozen=True)
class Turn:
    """Requests of random tokens, all at once.

    Attributes:
        prefill: seconds until all had their first token.
        step: seconds for each of the steps from then on until the first request ended.
        whole: seconds until all had ended.
    """

    prefill: float
    step: float
    whole: float


class Engine:
    """An engine with random weights of a format, in this process."""

    def __init__(self, sizes: Sizes, name: str, options: argparse.Namespace) -> None:
        from vllm import LLM

        from liquidgemm.integrations.vllm import register

        register()  # vLLM finds an installed package by itself
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(config_of(sizes, name)))
        on_gpu = options.device == "cuda"
        longest = max(
            options.prompt + 1,
            *(options.tokens + tokens_out(batch, options) for batch in options.batch),
        )
        more: dict = {}
        if FORMATS[name][0]:
            more["quantization"] = FORMATS[name][0]
        if name == "w4a8-apart":
            more["additional_config"] = {"liquidgemm": {"fused_producers": False}}
        if on_gpu:
            more["gpu_memory_utilization"] = 0.88
            more["compilation_config"] = {"cudagraph_capture_sizes": sorted(set(options.batch))}
        if options.at_once or not on_gpu:
            more["kv_cache_memory_bytes"] = kv_bytes(sizes, options)
            more["gpu_memory_utilization"] = 0.1  # of which vLLM asks only whether it is free
        start = time.perf_counter()
        self.llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=longest + 8,
            max_num_seqs=max(options.batch),
            max_num_batched_tokens=options.batched_tokens,
            enable_prefix_caching=False,
            kv_cache_dtype=options.kv,
            enforce_eager=not on_gpu,
            disable_log_stats=True,
            **more,
        )
        self.started = time.perf_counter() - start
        self.vocabulary = sizes.vocabulary
        self._asked = 0

    def layers(self) -> dict:
        """What computes the linear layers, and the bytes per weight that they take."""
        return self.llm.apply_model(_layers)[0]

    def kv_tokens(self) -> int:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def turn(self, batch: int, tokens: int, out: int) -> Turn:
        """``batch`` prompts of ``tokens``, ``out`` more of each.

        Raises:
            RuntimeError: a request got less or more.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        numbers = random.Random(batch)
        prompts = [
            [numbers.randrange(3, self.vocabulary) for _ in range(tokens)] for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=out,
            min_tokens=out,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        _wait()
        start = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            engine.add_request(str(self._asked), {"prompt_token_ids": prompt}, sampling)
        requests = list(scheduler.requests.values())[-batch:]
        if len(requests) != batch:
            raise RuntimeError(f"expected {batch} requests in the scheduler, got {len(requests)}")
        last = requests[-1]
        first_at = ended_at = 0.0
        before = after = 0
        lengths = []
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            lengths += [len(output.outputs[0].token_ids) for output in finished]
            if not first_at and all(request.num_output_tokens for request in requests):
                first_at, before = time.perf_counter(), last.num_output_tokens
            if finished and not ended_at:
                ended_at, after = time.perf_counter(), last.num_output_tokens
        _wait()
        whole = time.perf_counter() - start
        if lengths != [out] * batch:
            raise RuntimeError(f"expected {out} tokens of each of {batch}, got {lengths}")
        return Turn(first_at - start, (ended_at - first_at) / max(after - before, 1), whole)

    def measure(self, batch: int, options: argparse.Namespace) -> dict:
        """A row of ``steps``: the fastest of several turns."""
        out = tokens_out(batch, options)
        turns = [self.turn(batch, options.tokens, out) for _ in range(TURNS)]
        return {
            "batch": batch,
            "prefill_s": min(turn.prefill for turn in turns),
            "step_ms": min(turn.step for turn in turns) * 1e3,
            "step_ms_of_turns": [turn.step * 1e3 for turn in turns],
            "tokens_per_s": batch * out / min(turn.whole for turn in turns),
        }

    def prompt(self, tokens: int) -> dict:
        """The time to the first token of one prompt, the fastest of several."""
        times = [self.turn(1, tokens, 1).prefill for _ in range(2 * TURNS)]
        return {"tokens": tokens, "first_token_s": min(times), "first_token_s_of_turns": times}


def answer(connection: Connection, sizes: Sizes, name: str, options: argparse.Namespace) -> None:
    """What a process of a format does: start an engine, and measure what it is asked for.

    It is asked for batches, or for "prompt", and ends at None, or when who asks has ended.
    """
    try:
        engine = Engine(sizes, name, options)
        about = {"started_s": engine.started, "kv_tokens": engine.kv_tokens(), **engine.layers()}
        if about["bytes_per_weight"] > FORMATS[name][1]:
            raise RuntimeError(f"it is not {name}: {engine.layers()}")
        engine.turn(1, min(64, options.tokens), 8)
        connection.send(about)
        while (asked := connection.recv()) is not None:
            prompt = asked == "prompt"
            connection.send(
                engine.prompt(options.prompt) if prompt else engine.measure(asked, options)
            )
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}"[:2000])
    connection.close()
    sys.stdout.flush()
    # vLLM and Inductor leave threads and processes behind, which an ordinary end waits for.
    os._exit(0)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _layers(model: torch.nn.Module) -> dict:
    """Run by the engine where the model is."""
    methods, held, weights = set(), 0, 0
    head = {}
    for module in model.modules():
        if hasattr(module, "quant_method") and hasattr(module, "num_embeddings_per_partition"):
            if type(module).__name__ == "ParallelLMHead":
                head = {"head": type(module.quant_method).__name__}
            continue
        if hasattr(module, "quant_method") and hasattr(module, "input_size_per_partition"):
            methods.add(type(module.quant_method).__name__)
            held += sum(p.nbytes for p in module.parameters())
            weights += module.input_size_per_partition * module.output_size_per_partition
    return {"methods": sorted(methods), "bytes_per_weight": held / max(weights, 1)} | head
