"""The parts of `serve_check.py`: each starts an engine and says what holds."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import time
from pathlib import Path

import serve_rows
from serve_endpoint import endpoint
from serve_experts import experts
from serve_features import adapters, imports, speculation
from serve_requests import requests

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1, 5, 63, 64, 200, 511)
KV_BYTES = 4 << 30  # given, as measuring what is free needs a GPU without other processes
FEW_TOKENS = 12 << 10  # in a KV cache that has not room for 64 requests
RECIPE = {
    "skip": [],
    "augment": {"q_proj": 64, "k_proj": 128, "down_proj": 128},
    "keep": ["o_proj"],
}


class Check:
    """What a part measures and what must hold, in the order of asking."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.facts: dict[str, object] = {}
        self.held: list[str] = []
        self.failures: list[str] = []
        self.moved = 0.0  # RMS by which quantization moves the logits of the saved model
        self.text: list[int] = []  # tokens for prompts; none for random ones

    def note(self, name: str, value: object) -> None:
        self.facts[name] = value
        print(f"  {name}: {value}", flush=True)

    def require(self, holds: bool, what: str) -> None:
        print(f"  {'ok' if holds else 'FAILED'}: {what}", flush=True)
        (self.held if holds else self.failures).append(what)

    # Models.

    @property
    def vocabulary(self) -> int:
        return 512 if self.options.tiny else 32000

    def float_model(self, layers: int = 8):
        import torch
        import transformers

        tiny = self.options.tiny
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=256 if tiny else 2048,
            intermediate_size=448 if tiny else 5632,
            num_hidden_layers=2 if tiny else layers,
            num_attention_heads=8 if tiny else 16,
            num_key_value_heads=2 if tiny else 4,
            # With 64, vLLM's attention depends on the batch beyond 128 tokens whatever is asked.
            head_dim=32 if tiny else 128,
            attention_bias=True,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        with torch.device(self.options.device):
            model = transformers.LlamaForCausalLM(config).bfloat16().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def kv_bytes(self, tokens: int, layers: int = 8) -> int:
        """For the keys and values of so many tokens of `float_model`."""
        values = 2 * 2 * 2 * 32 if self.options.tiny else 2 * layers * 4 * 128
        return tokens * values * 2

    def quantized(self, recipe: dict, layers: int = 8):
        import liquidgemm

        model = self.float_model(layers)
        config = liquidgemm.LiquidConfig(**recipe)
        liquidgemm.quantize_(model, config, progress=False, verify=False)
        return model

    def save(self, folder: Path, layers: int = 8) -> tuple[list, list]:
        """Writes the quantized model; the logits of the float one and its own."""
        import liquidgemm

        floats = self.logits(self.float_model(layers))
        model = self.quantized(RECIPE, layers)
        liquidgemm.save_quantized(model, folder)
        wanted = self.logits(model)
        changes = (one - other for one, other in zip(wanted, floats, strict=True))
        self.moved = math.sqrt(sum(float(c.pow(2).mean()) for c in changes) / len(wanted))
        del model
        _collect()
        return floats, wanted

    def save_given(self, folder: Path) -> tuple[list, list]:
        """The same of the model that was given, whose prompts are text."""
        import liquidgemm
        from liquidgemm.checkpoints.sources import load_model

        model, tokenizer = load_model(str(self.options.model), self.options.device)
        self.text = tokenizer((ROOT / "README.md").read_text()).input_ids[: max(LENGTHS)]
        floats = self.logits(model)
        liquidgemm.quantize_(model, liquidgemm.LiquidConfig(), progress=False, verify=False)
        liquidgemm.save_quantized(model, folder)
        tokenizer.save_pretrained(folder)
        wanted = self.logits(model)
        del model
        _collect()
        return floats, wanted

    def prompts(self, lengths=LENGTHS) -> list[list[int]]:
        if self.text:
            return [self.text[:n] for n in lengths]
        numbers = random.Random(1)
        return [[numbers.randrange(3, self.vocabulary) for _ in range(n)] for n in lengths]

    def logits(self, model) -> list:
        """Of the last token of each prompt, by transformers."""
        import torch

        with torch.no_grad():
            ids = (torch.tensor([p], device=self.options.device) for p in self.prompts())
            return [model(one).logits[0, -1].float().cpu() for one in ids]

    def allocated(self) -> int:
        import torch

        _collect()
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    # vLLM.

    def engine(self, folder: Path, **options):
        import vllm

        start = time.perf_counter()
        options = {
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 64,
            "max_logprobs": self.vocabulary,
            "logprobs_mode": "raw_logits",
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": KV_BYTES,
        } | options
        if self.options.device == "cpu":
            most = min(options["kv_cache_memory_bytes"], 1 << 28)
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": most}
        llm = vllm.LLM(model=str(folder), **options)
        self.note("started_s", round(time.perf_counter() - start, 1))
        return llm

    def served(self, llm, **request) -> tuple[list, list[list[int]]]:
        """Logits of the last token of each prompt, and eight tokens after it, all at once."""
        import torch
        import vllm

        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=8, logprobs=self.vocabulary, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": p} for p in self.prompts()]
        results = llm.generate(prompts, sampling, use_tqdm=False, **request)
        logits = []
        for result in results:
            first = result.outputs[0].logprobs[0]
            logits.append(torch.tensor([first[i].logprob for i in range(self.vocabulary)]))
        return logits, [list(result.outputs[0].token_ids) for result in results]

    def near(
        self, got: list, wanted: list, changed: list, what: str, required: bool = True
    ) -> None:
        """Logits differ by less than half of what quantization changes."""
        for prompt, one, other, floats in zip(self.prompts(), got, wanted, changed, strict=True):
            error = float((one - other).norm() / other.norm())
            quantization = float((other - floats).norm() / floats.norm())
            said = (
                f"{what}, {len(prompt)} tokens: differs by {error:.4f} from transformers, "
                f"quantization by {quantization:.4f} from floats"
            )
            if required:
                self.require(error < quantization / 2, said)
            else:
                print(f"  {said}", flush=True)

    def twice(self, llm) -> list:
        import torch

        first, tokens = self.served(llm)
        llm.reset_prefix_cache()
        second, again = self.served(llm)
        llm.reset_prefix_cache()
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        self.require(same, "the second run gives the same logits to the bit")
        self.require(tokens == again, "and the same tokens")
        return first


def served(check: Check, folder: Path) -> None:
    """What is saved, in one engine: its logits, many requests, sleep.

    With little room for keys and values, so that requests are preempted, and few tokens for a step,
    so that prompts are prefilled in parts.
    """
    import torch

    floats, wanted = check.save(folder)
    options: dict = {"enable_sleep_mode": True} if torch.cuda.is_available() else {}
    options["kv_cache_memory_bytes"] = check.kv_bytes(FEW_TOKENS)
    options["max_num_batched_tokens"] = 1024
    llm = check.engine(folder, enable_prefix_caching=True, **options)
    check.near(check.twice(llm), wanted, floats, "saved")
    requests(check, llm, check.moved)
    check.require(check.facts["preempted"] > 0, "some requests were preempted")
    check.require(check.facts["from the prefix cache"] > 0, "some had a part in the prefix cache")
    if torch.cuda.is_available():
        sleep(check, llm)


def invariant(check: Check, folder: Path) -> None:
    """Many requests where vLLM asks its own arithmetic not to depend on the batch: ours must not.

    First layer by layer, so that one can tell whose fault it is if logits do.
    """
    check.save(folder)
    if check.options.device == "cuda":
        serve_rows.attention(check)
    llm = check.engine(folder, enable_prefix_caching=True, enforce_eager=True)
    with serve_rows.watched() as seen:
        requests(check, llm, None, compare=False)
    serve_rows.require(check, seen)
    del llm
    check.allocated()
    llm = check.engine(folder, enable_prefix_caching=True)
    requests(check, llm, None)


def online(check: Check, folder: Path) -> None:
    import torch

    layers = 24  # so that what the search holds meanwhile is little beside them
    model = check.float_model(layers)
    floats = check.logits(model)
    size = sum(p.nbytes for p in model.parameters())
    kept = sum(p.nbytes for n, p in model.named_parameters() if "embed" in n or "lm_head" in n)
    model.save_pretrained(folder, max_shard_size="200MB")
    del model
    model = check.quantized({}, layers)
    wanted = check.logits(model)
    del model
    _collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loaded = {}
    _at_the_end_of_loading(loaded)
    llm = check.engine(
        folder, quantization="liquidgemm", enable_prefix_caching=False, enforce_eager=True
    )
    check.note("float_bytes", size)
    check.note("of_which_stay_in_floats", kept)
    check.note("peak_bytes_while_loading", loaded.get("peak"))
    if torch.cuda.is_available():
        check.require(loaded["peak"] < size, "loading needs less memory than the float weights")
    check.near(check.twice(llm), wanted, floats, "quantized while loading")


def _at_the_end_of_loading(found: dict) -> None:
    """Notes the peak of memory when the plug-in says that all layers are there."""
    import torch

    from liquidgemm.integrations.vllm import summary

    lines = summary.Summary.lines

    def noting(self, device):
        if torch.cuda.is_available():
            found["peak"] = torch.cuda.max_memory_allocated()
        return lines(self, device)

    summary.Summary.lines = noting


def sleep(check: Check, llm) -> None:
    """Graphs that were captured before are replayed after, on weights at the same addresses."""
    import torch

    llm.reset_prefix_cache()
    before, _ = check.served(llm)
    for level in (1, 2):
        free = torch.cuda.mem_get_info()[0]
        llm.sleep(level=level)
        freed = torch.cuda.mem_get_info()[0] - free
        least = check.kv_bytes(FEW_TOKENS) // 2
        check.require(freed > least, f"sleep of level {level} frees memory: {freed} bytes")
        llm.wake_up()
        if level == 2:  # which drops the weights
            llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        after, _ = check.served(llm)
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        check.require(same, f"after a sleep of level {level} the same logits to the bit")


def tensor_parallel(check: Check, folder: Path) -> None:
    floats, wanted = check.save(folder)
    llm = check.engine(folder, tensor_parallel_size=2, enable_prefix_caching=False)
    check.near(check.twice(llm), wanted, floats, "two GPUs")


EXACT = {"additional_config": {"liquidgemm": {"exact_tensor_parallel": True}}}


def exact(check: Check, folder: Path) -> None:
    """The exact mode on two GPUs beside one, where vLLM's own arithmetic does not depend on it."""
    import torch

    check.save(folder)
    out = folder.with_suffix(".pt")
    alone = multiprocessing.get_context("spawn").Process(
        target=_on_one_gpu, args=(check.options, folder, out)
    )
    alone.start()
    if check.options.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    llm = check.engine(folder, tensor_parallel_size=2, enable_prefix_caching=False, **EXACT)
    two = check.twice(llm)
    alone.join()
    one = torch.load(out)
    same = [torch.equal(a, b) for a, b in zip(one, two, strict=True)]
    check.require(all(same), f"two GPUs give the logits of one to the bit, by prompt: {same}")


def _on_one_gpu(options: argparse.Namespace, folder: Path, out: Path) -> None:
    import torch

    check = Check(options)
    logits, _ = check.served(check.engine(folder, enable_prefix_caching=False))
    torch.save(logits, out)


def _collect() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS = {
    "served": served,
    "invariant": invariant,
    "online": online,
    "experts": experts,
    "adapters": adapters,
    "imports": imports,
    "speculation": speculation,
    "endpoint": endpoint,
    "tensor-parallel": tensor_parallel,
    "exact": exact,
}
