"""Tiny models through vLLM's engine, on the CPU: logits of a prefill as transformers gives them."""

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import foreign_models
import pytest
import torch
from engine import write_config
from engine_models import BOUND, PROMPT, VOCABULARY, float_model
from safetensors.torch import save_file

import liquidgemm
from liquidgemm import LiquidConfig, import_checkpoint, load_quantized, quantize_, save_quantized

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")

from liquidgemm.integrations.vllm import fusion  # noqa: E402


def quantized(folder: Path, tied: bool = False, **fields) -> Path:
    model = float_model(tied)
    quantize_(model, LiquidConfig(**fields), progress=False, verify=False)
    save_quantized(model, folder)
    return folder


def expected(model: torch.nn.Module, vocabulary: int = VOCABULARY) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT]) % vocabulary).logits[0, -1].float()


def engine(folder: Path, **options):
    options = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "dtype": "float32",
        "max_logprobs": VOCABULARY,
        "logprobs_mode": "raw_logits",
    } | options
    return vllm.LLM(model=str(folder), **options)


def logits(llm, vocabulary: int = VOCABULARY, **request) -> torch.Tensor:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=vocabulary)
    prompt = {"prompt_token_ids": [token % vocabulary for token in PROMPT]}
    (result,) = llm.generate([prompt], sampling, use_tqdm=False, **request)
    found = result.outputs[0].logprobs[0]
    return torch.tensor([found[i].logprob for i in range(vocabulary)])


def assert_near(actual: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> None:
    error = (actual - wanted).norm() / wanted.norm()
    assert error < bound, f"expected a relative difference below {bound}, got {error:.2e}"


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()


RECIPES = {
    "plain": {},
    "recommended": {"augment": {"down_proj": 64, "q_proj": 64, "k_proj": 128}, "keep": ["o_proj"]},
    "head": {"skip": (), "augment": 64},
    "float": {"skip": ("lm_head", "layers.0.*", "down_proj")},
    "tied": {"tied": True},
    "int8 head": {"tied": True, "head": "int8"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_we_save_is_served(recipe, tmp_path):
    """CHECKLIST 33: to the bit from call to call, and as offline."""
    folder = quantized(tmp_path, **RECIPES[recipe])
    llm = engine(folder)
    first = logits(llm)
    assert_near(first, expected(load_quantized(folder)))
    assert torch.equal(logits(llm), first)


def test_what_save_pretrained_writes_is_served(tmp_path):
    model = float_model()
    quantize_(model, LiquidConfig(augment=64), progress=False, verify=False)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_near(logits(engine(tmp_path)), expected(model))


HEAD = {"head": "int8"}
FIELDS = {"skip": ["lm_head"], "augment": {"down_proj": 64}, "keep": ["o_proj"], "group_size": 128}


@pytest.mark.parametrize(
    ("fields", "tied"),
    [(None, False), (FIELDS, False), ({"skip": []}, False), (HEAD, False), ({"skip": []}, True)],
    ids=["default", "fields", "head", "int8 head", "tied"],
)
def test_a_float_checkpoint_is_quantized_as_it_is_loaded(fields, tied, tmp_path):
    float_model(tied).save_pretrained(tmp_path)
    options = {}
    if fields is not None:
        settings = {"quant_method": "liquidgemm", "config": fields}
        options["hf_overrides"] = {"quantization_config": settings}
    llm = engine(tmp_path, quantization="liquidgemm", **options)
    model = float_model(tied)
    quantize_(model, LiquidConfig(**fields or {}), progress=False, verify=False)
    assert_near(logits(llm), expected(model))


def test_what_needs_data_is_refused(tmp_path):
    float_model().save_pretrained(tmp_path)
    for fields, name in (({"method": "gptq"}, "method"), ({"rotate": True}, "rotate")):
        settings = {"quant_method": "liquidgemm", "config": fields}
        with pytest.raises(Exception, match=f"{name}: expected .*liquidgemm quantize"):
            engine(
                tmp_path,
                quantization="liquidgemm",
                hf_overrides={"quantization_config": settings},
            )


@pytest.mark.parametrize("name", ["pack-quantized", "int-quantized", "awq", "gptq"])
def test_other_projects_checkpoints_are_converted_as_they_are_loaded(name, tmp_path):
    model = foreign_models.make("biases")
    foreign_models.write(model, tmp_path / "source", name)
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    vocabulary = model.config.vocab_size
    options = {"max_model_len": 64, "max_logprobs": vocabulary, "quantization": "liquidgemm"}
    wanted = expected(load_quantized(tmp_path / "out"), vocabulary)
    assert_near(logits(engine(tmp_path / "source", **options), vocabulary), wanted)


def test_weights_are_loaded_again_in_place(tmp_path):
    """What sleeping and reinforcement learning need: a graph that was captured stays valid."""
    # Layers with residual columns, with all columns twice and with none.
    recipe = {"augment": {"q_proj": 64}, "keep": ("o_proj",), "bits": {"down_proj": 6}}
    folder = quantized(tmp_path / "one", **recipe)
    llm = engine(folder)
    before = logits(llm)
    addresses = llm.apply_model(_addresses)[0]
    model = load_quantized(folder)
    other = float_model()
    for p in other.parameters():
        p.data.mul_(1.5)
    quantize_(other, LiquidConfig(**recipe), progress=False, verify=False)
    save_quantized(other, folder)
    llm.collective_rpc("reload_weights")
    assert llm.apply_model(_addresses)[0] == addresses
    llm.reset_prefix_cache()
    after = logits(llm)
    assert_near(before, expected(model))
    assert_near(after, expected(other))
    assert not torch.equal(before, after)


def _addresses(model) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters() if "_proj" in name}


@pytest.mark.parametrize("fused", [False, True])  # SiluAndMul stays replaced in this process
def test_compiled(fused, tmp_path, monkeypatch):
    """Norms and activations quantize for the layers after them, unless they are told not to.

    Also: no mark of a layer prevents torch.compile of the whole model.
    """
    if fused:  # as where vLLM has no table of activations that quantize
        monkeypatch.setattr(fusion, "state", lambda: "no: not in this test")
    folder = quantized(tmp_path, augment={"down_proj": 64})
    more = {"additional_config": {"liquidgemm": {"fused_producers": fused}}}
    llm = engine(folder, enforce_eager=False, max_num_batched_tokens=128, **more)
    assert_near(logits(llm), expected(load_quantized(folder)))
    if fused:
        monkeypatch.undo()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(llm)
    ran = Counter(event.name.removeprefix("liquidgemm::") for event in profile.events())
    blocks = load_quantized(folder).config.num_hidden_layers
    norms = 2 * blocks if fused else 0
    activations = blocks if fused or fusion.state() == "yes" else 0
    assert (ran["rms_norm_quantize"], ran["glu_quantize"]) == (norms, activations)
    assert (ran["gemm"], ran["linear"]) == (norms + activations, 4 * blocks - norms - activations)


def test_prefix_cache_and_chunks_change_little(tmp_path):
    folder = quantized(tmp_path)
    wanted = expected(load_quantized(folder))
    llm = engine(folder, enable_chunked_prefill=True, max_num_batched_tokens=16, max_num_seqs=4)
    assert_near(logits(llm), wanted)
    llm = engine(folder, enable_prefix_caching=True)
    for _ in range(2):
        assert_near(logits(llm), wanted)


def adapter(folder: Path, model: torch.nn.Module, rank: int = 4) -> Path:
    """An adapter of PEFT's form for some layers, and a float model's outputs with it by hooks."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"target_modules": targets, "task_type": "CAUSAL_LM"})
    )
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in targets:
            a = torch.randn(rank, layer.in_features, generator=generator) / 20
            b = torch.randn(layer.out_features, rank, generator=generator) / 20
            key = f"base_model.model.{name}.lora_"
            tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
            layer.register_forward_hook(
                lambda _, inputs, y, a=a, b=b: y + 2 * inputs[0] @ a.T @ b.T
            )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("skip", [("lm_head",), ()], ids=["float head", "quantized head"])
def test_adapters_are_swapped(skip, tmp_path):
    """CHECKLIST 33: LoRA on quantized layers, with and without, one after the other."""
    from vllm.lora.request import LoRARequest

    folder = quantized(tmp_path / "model", augment={"down_proj": 64}, skip=skip)
    model = load_quantized(folder)
    plain = expected(model)
    request = LoRARequest("one", 1, str(adapter(tmp_path / "lora", model)))
    adapted = expected(model)
    assert (adapted - plain).norm() / plain.norm() > 10 * BOUND
    llm = engine(folder, enable_lora=True, max_lora_rank=8, enable_prefix_caching=False)
    for one, wanted in ((None, plain), (request, adapted), (None, plain)):
        assert_near(logits(llm, lora_request=one), wanted)


TP2 = """
import sys, torch
sys.path[:0] = {path!r}
from test_vllm_engine import engine, logits
if __name__ == "__main__":
    torch.save(logits(engine({folder!r}, tensor_parallel_size=2, **{options!r})), {out!r})
"""


def in_two_processes(folder: Path, **options) -> torch.Tensor:
    """Logits with tensor parallelism, the entry point in each process."""
    if not entry_points(group="vllm.general_plugins", name="liquidgemm"):
        pytest.skip("liquidgemm is not installed here, so that other processes do not know it")
    script, out = folder.with_suffix(".py"), folder.with_suffix(".pt")
    root, tests = Path(liquidgemm.__file__).parents[1], Path(__file__).parents[1]
    here = [str(folder) for folder in (tests / "serving", tests / "support", root)]
    script.write_text(TP2.format(path=here, folder=str(folder), out=str(out), options=options))
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": os.pathsep.join(here)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


# intermediate_size / 2 is no multiple of 64. The head is ours, as others' may depend on its width.
SPLIT = {"augment": {"down_proj": 64}, "keep": ("o_proj",), "skip": ()}


def test_two_processes(tmp_path):
    folder = quantized(tmp_path / "model", **SPLIT)
    # Each of the two has scales of its own for its half of the tokens of o_proj and down_proj.
    wanted = expected(load_quantized(folder))
    error = (in_two_processes(folder) - wanted).norm() / wanted.norm()
    assert 1e-6 < error < 0.05


def test_two_processes_give_the_bits_of_one(tmp_path):
    """CHECKLIST 34: the exact mode."""
    folder = quantized(tmp_path / "model", **SPLIT)
    exact = {"additional_config": {"liquidgemm": {"exact_tensor_parallel": True}}}
    assert torch.equal(in_two_processes(folder, **exact), logits(engine(folder)))


def test_a_gpu_that_is_no_hopper_gets_the_reason(monkeypatch):
    from liquidgemm.integrations.vllm import summary
    from liquidgemm.ops import _library

    monkeypatch.setattr(summary.current_platform, "is_cpu", lambda: False, raising=False)
    monkeypatch.setattr(summary.current_platform, "is_cuda", lambda: True, raising=False)
    monkeypatch.setattr(_library, "load_libraries", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    with pytest.raises(ValueError, match=r"got 10\.0 \(NVIDIA B200\): serve the float model"):
        summary.check_device()


def test_an_error_of_the_checkpoint_reaches_the_user(tmp_path):
    folder = quantized(tmp_path)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    write_config(folder, quantization_config=settings | {"format_version": 9})
    with pytest.raises(Exception, match="newer liquidgemm"):
        engine(folder)


# The last: it imports numba, beside which vLLM for CPUs makes no further engine in this process.
def test_speculative_decoding_gives_the_tokens_of_one_at_a_time(tmp_path):
    folder = quantized(tmp_path)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=24, detokenize=False)
    prompt = {"prompt_token_ids": [1, 2, 3, 4] * 8}
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    tokens = []
    for how in (None, ngram):
        llm = engine(folder, speculative_config=how)
        (result,) = llm.generate([prompt], sampling, use_tqdm=False)
        tokens.append(list(result.outputs[0].token_ids))
    assert tokens[0] == tokens[1]
