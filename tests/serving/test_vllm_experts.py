"""Tiny models with experts through vLLM's engine, on the CPU, as transformers computes them."""

import json
from types import SimpleNamespace

import moe_models
import pytest
import torch
from engine import write_config

from liquidgemm import LiquidConfig, LiquidExperts, load_quantized, quantize_, save_quantized

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")
serving = pytest.importorskip("test_vllm_engine")

VOCABULARY = 128
OPTIONS = {"max_model_len": 64, "max_logprobs": VOCABULARY}
# Attention in floats: then what reaches the experts is the same in both but for the order of sums.
SKIP = ["lm_head", "*self_attn*"]


def model_of(family: str) -> torch.nn.Module:
    return moe_models.moe_model(family, head_dim=32, hidden_size=128)


def expected(model: torch.nn.Module) -> torch.Tensor:
    return serving.expected(model, VOCABULARY)


def saved(folder, family: str = "Qwen3Moe"):
    model = model_of(family)
    quantize_(model, LiquidConfig(skip=SKIP), progress=False, verify=False)
    save_quantized(model, folder)
    return load_quantized(folder)


@pytest.fixture
def calls(monkeypatch):
    """What the experts of vLLM get and give."""
    from liquidgemm.integrations.vllm.experts import ExpertsMethod

    found, apply = [], ExpertsMethod.apply

    def noting(self, layer, x, topk_weights, topk_ids, *args, **kwargs):
        given = x.clone(), topk_ids.clone(), topk_weights.clone()
        y = apply(self, layer, x, topk_weights, topk_ids)
        found.append((*given, y.clone()))
        return y

    monkeypatch.setattr(ExpertsMethod, "apply", noting)
    return found


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_saved_experts_are_served(family, tmp_path, calls):
    """Logits as those of transformers, and each layer of experts to the bit."""
    model = saved(tmp_path, family)
    llm = serving.engine(tmp_path, **OPTIONS)
    calls.clear()
    first = serving.logits(llm, VOCABULARY)
    layers = [layer for layer in model.modules() if isinstance(layer, LiquidExperts)]
    assert len(calls) == len(layers) == 2
    for layer, (x, ids, weights, y) in zip(layers, calls, strict=True):
        assert torch.equal(layer(x, ids, weights), y)
    serving.assert_near(first, expected(model))
    assert torch.equal(serving.logits(llm, VOCABULARY), first)


def test_float_experts_are_quantized_as_they_are_loaded(tmp_path):
    model = model_of("Qwen3Moe")
    model.save_pretrained(tmp_path)
    settings = {"quant_method": "liquidgemm", "config": {"skip": SKIP}}
    llm = serving.engine(
        tmp_path,
        quantization="liquidgemm",
        hf_overrides={"quantization_config": settings},
        **OPTIONS,
    )
    quantize_(model, LiquidConfig(skip=SKIP), progress=False, verify=False)
    serving.assert_near(serving.logits(llm, VOCABULARY), expected(model))


def test_sizes_that_are_not_the_models_are_refused(tmp_path):
    saved(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for sizes in settings["experts"].values():
        sizes["activation"] = "gelu_tanh_mul"
    write_config(tmp_path, quantization_config=settings)
    with pytest.raises(Exception, match=r"experts: expected \{'activation': 'silu_mul'\}"):
        serving.engine(tmp_path, **OPTIONS)


def part_of(whole: LiquidExperts, expert_map=None, rank: int = 0, size: int = 1):
    """The method and layer of one GPU of several, loaded with the tensors of all experts."""
    from liquidgemm.integrations.vllm.experts import LiquidExpertsMethod
    from liquidgemm.integrations.vllm.summary import Summary

    moe = SimpleNamespace(
        num_experts=whole.num_experts,
        tp_rank=rank,
        tp_size=size,
        ep_size=1,
        moe_parallel_config=SimpleNamespace(use_all2all_kernels=False),
    )
    layer = torch.nn.Module()
    layer.activation = SimpleNamespace(value="silu")
    layer.apply_router_weight_on_input = False
    layer.expert_map = expert_map
    count = whole.num_experts if expert_map is None else int((expert_map >= 0).sum())
    layer.local_num_experts = count
    method = LiquidExpertsMethod(moe, "experts", whole.sizes, Summary())
    inner = whole.intermediate_size // size
    method.create_weights(layer, count, whole.hidden_size, inner, torch.float32)
    assert sorted(layer.load_weights(whole.state_dict().items())) == sorted(whole.state_dict())
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.fixture(scope="module")
def whole() -> LiquidExperts:
    torch.manual_seed(0)
    floats = torch.nn.ModuleList()
    for _ in range(6):
        expert = torch.nn.Module()
        expert.gate_proj, expert.up_proj = (torch.nn.Linear(64, 128, bias=False) for _ in "gu")
        expert.down_proj = torch.nn.Linear(128, 64, bias=False)
        floats.append(expert)
    return LiquidExperts.from_experts(floats)


def routing(experts: int):
    x = torch.randn(9, 64)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in x]).int()
    return x, torch.rand(9, 3), ids


def test_inner_channels_are_sliced(whole):
    x, weights, ids = routing(6)
    for rank in (0, 1):
        method, layer = part_of(whole, rank=rank, size=2)
        own = whole.narrow(64 * rank, 64)
        assert torch.equal(method.apply(layer, x, weights, ids), own(x, ids, weights))


def test_experts_are_spread_in_any_order(whole):
    """Expert parallelism: a token's experts on other GPUs, and a sentinel, add nothing."""
    x, weights, ids = routing(6)
    ids[0, 0] = -1
    for own in ([0, 1, 2], [4, 1], [5]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[own] = torch.arange(len(own), dtype=torch.int32)
        method, layer = part_of(whole, expert_map)
        elsewhere = torch.where(torch.isin(ids, torch.tensor(own)), ids, -1)
        assert torch.equal(method.apply(layer, x, weights, ids), whole(x, elsewhere, weights))


def test_what_cannot_be_sliced_is_refused(whole):
    with pytest.raises(ValueError, match="64 inner channels for each of 4 GPUs, got 32"):
        part_of(whole, size=4)
