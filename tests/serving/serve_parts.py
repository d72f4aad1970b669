"""The parts of `serve_check.py`: each starts an engine and says what holds."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

LENGTHS = (1, 5, 63, 64, 200, 511)
GAP = 0.15  # of logits: bf16 around our layers does not round alike in other batches
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
        self.failures: list[str] = []

    def note(self, name: str, value: object) -> None:
        self.facts[name] = value
        print(f"  {name}: {value}", flush=True)

    def require(self, holds: bool, what: str) -> None:
        print(f"  {'ok' if holds else 'FAILED'}: {what}", flush=True)
        if not holds:
            self.failures.append(what)

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
            num_attention_heads=8 if tiny else 32,
            num_key_value_heads=2 if tiny else 8,
            head_dim=32 if tiny else 64,
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

    def quantized(self, recipe: dict, layers: int = 8):
        import liquidgemm

        model = self.float_model(layers)
        config = liquidgemm.LiquidConfig(**recipe)
        liquidgemm.quantize_(model, config, progress=False, verify=False)
        return model

    def prompts(self, lengths=LENGTHS) -> list[list[int]]:
        numbers = random.Random(1)
        return [[numbers.randrange(3, self.vocabulary) for _ in range(n)] for n in lengths]

    def logits(self, model) -> list:
        """Of the last token of each prompt, by transformers."""
        import torch

        with torch.no_grad():
            ids = (torch.tensor([p], device=self.options.device) for p in self.prompts())
            return [model(one).logits[0, -1].float().cpu() for one in ids]

    # vLLM.

    def engine(self, folder: Path, **options):
        import vllm

        start = time.perf_counter()
        options = {"gpu_memory_utilization": 0.4} | options
        if self.options.device == "cpu":
            options |= {"enforce_eager": True, "gpu_memory_utilization": 0.1}
        llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=64,
            max_logprobs=self.vocabulary,
            logprobs_mode="raw_logits",
            **options,
        )
        self.note("started_s", round(time.perf_counter() - start, 1))
        return llm

    def served(self, llm) -> tuple[list, list[list[int]]]:
        """Logits of the last token of each prompt, and eight tokens after it, all at once."""
        import torch
        import vllm

        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=8, logprobs=self.vocabulary, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": p} for p in self.prompts()]
        results = llm.generate(prompts, sampling, use_tqdm=False)
        logits = []
        for result in results:
            first = result.outputs[0].logprobs[0]
            logits.append(torch.tensor([first[i].logprob for i in range(self.vocabulary)]))
        return logits, [list(result.outputs[0].token_ids) for result in results]

    def near(self, got: list, wanted: list, changed: list, what: str) -> None:
        """Logits differ by less than half of what quantization changes."""
        for prompt, one, other, floats in zip(self.prompts(), got, wanted, changed, strict=True):
            error = float((one - other).norm() / other.norm())
            quantization = float((other - floats).norm() / floats.norm())
            self.require(
                error < quantization / 2,
                f"{what}, {len(prompt)} tokens: differs by {error:.4f} from transformers, "
                f"quantization by {quantization:.4f} from floats",
            )

    def twice(self, llm) -> list:
        import torch

        (first, tokens), (second, again) = self.served(llm), self.served(llm)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        self.require(same, "the second run gives the same logits to the bit")
        self.require(tokens == again, "and the same tokens")
        return first


def saved(check: Check, folder: Path) -> None:
    import liquidgemm

    floats = check.logits(check.float_model())
    model = check.quantized(RECIPE)
    liquidgemm.save_quantized(model, folder)
    wanted = check.logits(model)
    del model
    _collect()
    llm = check.engine(folder, enable_prefix_caching=False)
    check.near(check.twice(llm), wanted, floats, "saved")


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
    llm = check.engine(folder, quantization="liquidgemm", enable_prefix_caching=False)
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


def requests(check: Check, folder: Path) -> None:
    import vllm

    import liquidgemm

    model = check.quantized(RECIPE)
    liquidgemm.save_quantized(model, folder)
    del model
    _collect()
    llm = check.engine(folder, enable_prefix_caching=True)
    engine = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    numbers = random.Random(2)
    count = check.options.requests
    prompts, wishes, aborted, finished, pending = {}, {}, set(), {}, []
    shared = [numbers.randrange(3, check.vocabulary) for _ in range(96)]  # for the prefix cache
    for i in range(count):
        own = [numbers.randrange(3, check.vocabulary) for _ in range(numbers.randint(1, 400))]
        prompts[str(i)] = shared[: numbers.choice((0, 32, 96))] + own
        wishes[str(i)] = numbers.randint(1, 48)
        pending.append(str(i))
    sampling = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    check.served(llm)  # so that what is allocated once is there
    engine.reset_prefix_cache()
    before = pool.get_num_free_blocks(), _allocated()
    running: set[str] = set()
    start = time.perf_counter()
    while pending or running:
        while pending and len(running) < 96:
            name = pending.pop()
            params = vllm.SamplingParams(max_tokens=wishes[name], logprobs=2, **sampling)
            engine.add_request(name, {"prompt_token_ids": prompts[name]}, params)
            running.add(name)
        if running and numbers.random() < 0.05:
            victim = numbers.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
            aborted.add(victim)
        for output in engine.step():
            if output.finished and output.request_id in running:
                finished[output.request_id] = output
                running.discard(output.request_id)
        if time.monotonic() > check.options.deadline:
            engine.abort_request(sorted(running))
            aborted |= running
            check.note("not run", f"{len(pending)} requests: the budget has ended")
            break
    for _ in range(3):
        engine.step()
    took = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in finished.values())
    check.note("finished", len(finished))
    check.note("aborted", len(aborted))
    check.note("tokens_per_s", round(tokens / took))
    wrong = [n for n, o in finished.items() if len(o.outputs[0].token_ids) != wishes[n]]
    check.require(not wrong, f"each has as many tokens as it asked for; others: {wrong[:5]}")
    engine.reset_prefix_cache()
    after = pool.get_num_free_blocks(), _allocated()
    check.require(after[0] == before[0], f"free KV blocks: {before[0]} before, {after[0]} after")
    grown = after[1] - before[1]
    check.require(grown < 16 << 20, f"memory: {grown} bytes more than before")
    # A token alone must be the same, unless the two best are nearly tied.
    compared, flips, shifts = 0, [], []
    for name in sorted(finished)[: check.options.compare]:
        params = vllm.SamplingParams(max_tokens=wishes[name], logprobs=2, **sampling)
        prompt = {"prompt_token_ids": prompts[name]}
        engine.reset_prefix_cache()
        (alone,) = llm.generate([prompt], params, use_tqdm=False)
        both = finished[name].outputs[0], alone.outputs[0]
        for at, (token, other) in enumerate(zip(*(o.token_ids for o in both), strict=True)):
            # Logits of the two best, and by how much the best leads, in each run.
            best = [_best(output.logprobs[at]) for output in both]
            leads = [one[0][1] - one[1][1] for one in best]
            compared += 1
            if token != other:
                flips.append({"request": name, "at": at, "best": best, "leads": leads})
                break  # what follows has another past
            if best[0][1][0] == best[1][1][0]:  # the same second
                shifts.append(abs(leads[0] - leads[1]))
    check.note("tokens_compared", compared)
    shifts.sort()
    check.note(
        "change of the lead where tokens are equal, by share of tokens",
        {q: shifts[min(int(q * len(shifts)), len(shifts) - 1)] for q in (0.5, 0.9, 0.99, 1.0)}
        if shifts
        else None,
    )
    wrong = sum(min(flip["leads"]) >= GAP for flip in flips)
    check.note("flips", flips)
    check.require(wrong == 0, f"tokens equal those of a run alone, near-ties apart; wrong: {wrong}")
    check.require(compared > 0, "some were compared")


def _best(found: dict) -> list[tuple[int, float]]:
    """The two best tokens and their logits, the best first."""
    pairs = ((token, entry.logprob) for token, entry in found.items())
    return sorted(pairs, key=lambda pair: -pair[1])[:2]


def sleep(check: Check, folder: Path) -> None:
    """Graphs that were captured before are replayed after, on weights at the same addresses."""
    import torch

    import liquidgemm

    model = check.quantized(RECIPE)
    liquidgemm.save_quantized(model, folder)
    del model
    _collect()
    llm = check.engine(folder, enable_sleep_mode=True, enable_prefix_caching=False)
    before, _ = check.served(llm)
    for level in (1, 2):
        free = torch.cuda.mem_get_info()[0]
        llm.sleep(level=level)
        freed = torch.cuda.mem_get_info()[0] - free
        check.require(freed > 1 << 28, f"sleep of level {level} frees memory: {freed} bytes")
        llm.wake_up()
        if level == 2:  # which drops the weights
            llm.collective_rpc("reload_weights")
        after, _ = check.served(llm)
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        check.require(same, f"after a sleep of level {level} the same logits to the bit")


def tensor_parallel(check: Check, folder: Path) -> None:
    import liquidgemm

    floats = check.logits(check.float_model())
    model = check.quantized(RECIPE)
    liquidgemm.save_quantized(model, folder)
    wanted = check.logits(model)
    del model
    _collect()
    llm = check.engine(folder, tensor_parallel_size=2, enable_prefix_caching=False)
    check.near(check.twice(llm), wanted, floats, "two GPUs")


def _allocated() -> int:
    import torch

    _collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _collect() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS = {
    "saved": saved,
    "online": online,
    "requests": requests,
    "sleep": sleep,
    "tensor-parallel": tensor_parallel,
}
