"""Fused layers, merged projections and an 8-bit head on the GPU; the CPU tests cover more cases."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from problems import DEVICE, assert_equal

import liquidgemm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_transformers import assert_greedy  # noqa: E402

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.1,  # logits far enough apart for greedy answers to be the same
}
IDS = (torch.arange(2 * 9) * 7 % 512).view(2, 9)


def quantized(kind: str):
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    liquidgemm.quantize_(model, liquidgemm.LiquidConfig(head="int8"), progress=False)
    return model


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "Qwen3", "Gemma3Text"])
def models(request):
    """On the GPU: a quantized model and the same fused."""
    model = quantized(request.param).to(DEVICE)
    fused = copy.deepcopy(model)
    report = liquidgemm.fuse_(fused)
    assert len(report.fused) == 2, str(report)
    assert not report.apart
    return model, fused


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS.to(DEVICE)).logits


def test_fused_equals_the_operations_one_by_one(models) -> None:
    model, fused = models
    apart = copy.deepcopy(fused)
    for layer in apart.model.layers:
        layer.fusion = replace(layer.fusion, composite=True)
    assert_equal(logits(apart), logits(fused), "one by one")
    expected = logits(model).float()
    error = ((logits(fused).float() - expected).norm() / expected.norm()).item()
    assert error < 0.02, f"off from the unfused model by {error}"


def test_merged_products_have_the_bits_of_the_cpu(models) -> None:
    _, fused = models
    merged = fused.model.layers[0].self_attn.liquid_projections.merged[0]
    assert merged.is_merged
    on_cpu = copy.deepcopy(merged).cpu()
    for part in on_cpu.parts:
        part.cpu()
    on_cpu.merge()
    for m in (1, 2, 16, 77):
        x = torch.randn(m, 256, device=DEVICE, dtype=torch.bfloat16)
        expected = torch.cat([part(x) for part in merged.parts], dim=-1)
        assert_equal(merged(x), expected, f"{m=}, layer by layer")
        assert_equal(merged(x).cpu(), on_cpu(x.cpu()), f"{m=}, on the CPU")


def test_weights_are_there_once(models) -> None:
    model, fused = models
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    copied = copy.deepcopy(model)
    plain = torch.cuda.memory_allocated() - before
    copied_fused = copy.deepcopy(fused)
    both = torch.cuda.memory_allocated() - before
    assert both - plain <= 1.05 * plain
    moved = copied_fused.cpu().to(DEVICE)
    del copied
    gc.collect()  # a quantized model of transformers refers to itself, by its save_pretrained
    assert torch.cuda.memory_allocated() - before <= 1.05 * plain
    assert all(m.is_merged for m in moved.modules() if isinstance(m, liquidgemm.MergedLinear))


@pytest.mark.parametrize("compiled", [False, True])
def test_generates_with_a_static_cache(models, compiled) -> None:
    """Compiled: whole graphs only, in CUDA graphs; the second call replays them."""
    _, fused = models
    torch._dynamo.reset()
    options = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": "static"}
    if compiled:
        # dynamic=False would compile anew for each token where a cache counts in Python, as that of
        # a sliding window does.
        options["compile_config"] = transformers.CompileConfig(
            mode="reduce-overhead", fullgraph=True, dynamic=None
        )
    else:
        options["disable_compile"] = True
    ids = IDS.to(DEVICE)
    mask = torch.ones_like(ids)
    found = [fused.generate(ids, attention_mask=mask, **options) for _ in range(2)]
    assert found[0].shape == (2, 25)
    assert_equal(found[1], found[0], "generated again")
    assert_greedy(fused, found[0], 9, "compiled" if compiled else "eager")


@torch.no_grad()
def test_a_layer_in_a_graph(models) -> None:
    """CHECKLIST 12: replays on other inputs write what eager calls give."""
    _, fused = models
    layer = fused.model.layers[0]
    x = torch.randn(3, 1, 256, device=DEVICE).bfloat16()
    cos, sin = (torch.ones(1, 1, 64, device=DEVICE).bfloat16() for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, attention_mask=None, position_embeddings=(cos, sin))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, attention_mask=None, position_embeddings=(cos, sin))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert_equal(y, layer(x, attention_mask=None, position_embeddings=(cos, sin)), f"{seed=}")


def test_the_head_has_the_bits_of_the_cpu(models) -> None:
    head = models[0].lm_head
    assert isinstance(head, liquidgemm.LiquidLinear)
    on_cpu = copy.deepcopy(head).cpu()
    for m in (1, 16, 65):
        x = torch.randn(m, 256, device=DEVICE, dtype=torch.bfloat16)
        assert_equal(head(x).cpu(), on_cpu(x.cpu()), f"{m=}")
