"""Adapters, speculative decoding, and checkpoints of other projects, in an engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FORMATS = ("awq", "gptq", "pack-quantized", "int-quantized")
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
RANK = 8
BOUND = 0.05
GUESSES = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")


def adapters(check, folder: Path) -> None:
    """With and without one, one after the other, captured graphs in both."""
    import torch
    from vllm.lora.request import LoRARequest

    import liquidgemm

    floats, plain = check.save(folder / "model")
    model = liquidgemm.load_quantized(folder / "model").to(check.options.device)
    request = LoRARequest("one", 1, str(adapter(folder / "adapter", model)))
    adapted = check.logits(model)
    del model
    moved = min(float((a - b).norm() / b.norm()) for a, b in zip(adapted, plain, strict=True))
    check.note("an adapter moves logits at least by", moved)
    llm = check.engine(
        folder / "model", enable_lora=True, max_lora_rank=RANK, enable_prefix_caching=False
    )
    found = []
    for name, one, wanted in (
        ("no adapter", None, plain),
        ("an adapter", request, adapted),
        ("none again", None, plain),
    ):
        logits, _ = check.served(llm, lora_request=one)
        # `floats` has no adapter: all that is taken of it is how much quantization changes.
        changed = [w + f - p for w, f, p in zip(wanted, floats, plain, strict=True)]
        check.near(logits, wanted, changed, name)
        found.append(logits)
    same = all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    check.require(same, "before and after an adapter the same logits to the bit")
    del llm
    check.allocated()


def adapter(folder: Path, model) -> Path:
    """An adapter of PEFT's form; a model of transformers gets it by hooks."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    settings |= {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in TARGETS:
            continue
        a = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
        b = torch.randn(layer.out_features, RANK, generator=generator) / 50
        a, b = a.bfloat16(), b.bfloat16()
        key = f"base_model.model.{name}.lora_"
        tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
        device = next(model.parameters()).device
        a, b = a.to(device), b.to(device)
        layer.register_forward_hook(
            lambda _, inputs, y, a=a, b=b: y + 2 * (inputs[0].to(a.dtype) @ a.T @ b.T).to(y.dtype)
        )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def speculation(check, folder: Path) -> None:
    """By n-grams of the prompt: logits are those of one token at a time.

    In a process of its own: numba, which it imports, keeps vLLM from further engines.
    """
    import vllm
    from serve_requests import SAMPLING, Comparison

    check.save(folder)
    prompts = [[i, i + 1, i + 2, i + 3] * 12 for i in range(3, 33)]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    runs, guesses = [], {}
    for how in (None, ngram):
        llm = check.engine(folder, speculative_config=how, disable_log_stats=False)
        sampling = vllm.SamplingParams(max_tokens=32, **SAMPLING)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        runs.append(llm.generate(asked, sampling, use_tqdm=False))
        for metric in llm.get_metrics():
            if metric.name in GUESSES:
                guesses[metric.name] = metric.value
        del llm
        check.allocated()
    found = Comparison()
    for i, (alone, guessed) in enumerate(zip(*runs, strict=True)):
        found.add(str(i), len(prompts[i]), guessed.outputs[0], alone.outputs[0])
    check.note("guesses", guesses)
    check.require(guesses.get(GUESSES[0], 0) > 0, "tokens were guessed")
    check.note("tokens_compared", found.tokens)
    check.note("largest change of a logit, by share of tokens", found.spread())
    check.note("flips", found.flips)
    most, bound = max(found.changes), check.moved
    check.require(
        most < bound,
        f"guesses move no logit as far as quantization does (RMS, {bound:.3f}): {most:.3f}",
    )


def imports(check, folder: Path) -> None:
    """Small models as other projects save them, converted as they are loaded."""
    import torch
    import vllm

    import liquidgemm

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    import foreign_models

    prompt = [(7 * i) % 120 for i in range(40)]
    for name in FORMATS:
        source, out = folder / name, folder / f"{name}-ours"
        model = foreign_models.make("biases")
        foreign_models.write(model, source, name)
        liquidgemm.import_checkpoint(source, out, progress=False)
        model = liquidgemm.load_quantized(out).to(check.options.device, torch.bfloat16)
        with torch.no_grad():
            ids = torch.tensor([prompt], device=check.options.device)
            wanted = model(ids).logits[0, -1].float().cpu()
        del model
        vocabulary = len(wanted)
        llm = check.engine(
            source,
            quantization="liquidgemm",
            enforce_eager=True,
            max_model_len=64,
            max_logprobs=vocabulary,
        )
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=1, logprobs=vocabulary, detokenize=False
        )
        (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        found = result.outputs[0].logprobs[0]
        logits = torch.tensor([found[i].logprob for i in range(vocabulary)])
        error = float((logits - wanted).norm() / wanted.norm())
        # A tensor that is read wrong changes all; what is around our layers computes in bfloat16.
        check.require(error < BOUND, f"{name}: differs by {error:.4f} from what was imported")
        del llm
        check.allocated()
