"""fuse_: decoder layers with fused producers, to the bit of the same operations one by one."""

import copy
import pickle
from dataclasses import replace

import peft
import pytest
import tiny_models
import torch
from reference import assert_same

from liquidgemm import (
    dequantize_,
    fuse_,
    load_quantized,
    quantize_,
    save_quantized,
    unfuse_,
)
from liquidgemm.integrations.transformers_cache import LiquidCache
from liquidgemm.nn.fused_layer import FusedLayer

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2", "Gemma3Text"]
TOKENS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def quantized(kind="Llama", dtype=torch.bfloat16, config=None, **fields):
    model = tiny_models.make(kind, **SIZES | fields).to(dtype)
    quantize_(model, config, progress=False, verify=False)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A quantized model of each family, and the same fused."""
    model = quantized(request.param)
    fused = copy.deepcopy(model)
    return model, fused, fuse_(fused)


def logits(model):
    return tiny_models.logits(model, TOKENS)


def layers(model):
    return model.get_submodule("model.layers")


def assert_near(model, original):
    """Isolated roundings apart, which the layers behind make a little more of."""
    expected = logits(original).float()
    assert ((logits(model).float() - expected).norm() / expected.norm()).item() < 0.02


# What is computed.


def test_families_are_fused(family):
    model, fused, report = family
    assert report.fused == ("model.layers.0", "model.layers.1")
    assert not report.left
    assert not report.apart
    assert max(report.errors.values()) < 0.05
    assert all(isinstance(layer, FusedLayer) for layer in layers(fused))
    assert_near(fused, model)


def test_fused_equals_the_operations_one_by_one(family):
    _, fused, _ = family
    apart = copy.deepcopy(fused)
    for layer in layers(apart):
        layer.fusion = replace(layer.fusion, composite=True)
    assert_same(logits(fused), logits(apart))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    model = quantized(dtype=dtype)
    fused = copy.deepcopy(model)
    assert len(fuse_(fused).fused) == 2
    assert_near(fused, model)


def test_batches_do_not_change_a_token(llama):
    """Of one layer, as attention in floats is no part of the promise."""
    layer = layers(llama[1])[0]
    x = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    embed = llama[1].model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.int64))
    with torch.no_grad():
        whole = layer(x, position_embeddings=embed)
        for row in range(5):
            assert_same(layer(x[row : row + 1], position_embeddings=embed)[0], whole[row])


def test_arguments_by_position(llama):
    layer = layers(llama[1])[0]
    x = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    mask[..., 2:] = float("-inf")
    embed = llama[1].model.rotary_emb(x, torch.arange(4).unsqueeze(0))
    with torch.no_grad():
        expected = layer(x, attention_mask=mask, position_embeddings=embed)
        assert_same(layer(x, mask, position_embeddings=embed), expected)


# What stays.


def test_names_and_state_stay(family):
    model, fused, _ = family
    tiny_models.assert_same_state(fused, tiny_models.state(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_unfuse_takes_everything_back(family):
    model, fused, _ = family
    fused = unfuse_(copy.deepcopy(fused))
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    tiny_models.assert_same_state(fused, tiny_models.state(model))
    assert_same(logits(fused), logits(model))


def test_fused_twice_is_fused_once(llama):
    fused = copy.deepcopy(llama[1])
    report = fuse_(fused)
    assert report.fused == llama[2].fused
    assert not report.errors
    assert not report.left
    assert_same(logits(fused), logits(llama[1]))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(m).float()],
    ids=["deepcopy", "pickle", "float"],
)
def test_copies_are_fused(llama, copied):
    fused = copied(llama[1])
    assert all(isinstance(layer, FusedLayer) for layer in layers(fused))
    merged = layers(fused)[0].self_attn.liquid_projections.merged[0]
    assert merged.is_merged
    assert merged.parts[0] is layers(fused)[0].self_attn.q_proj
    expected = llama[1] if fused.dtype == torch.bfloat16 else copy.deepcopy(llama[1]).float()
    assert_same(logits(fused), logits(expected))


@pytest.mark.parametrize("writer", ["save_quantized", "save_pretrained"])
def test_checkpoints_of_fused_models(llama, tmp_path, writer):
    model, fused, _ = llama
    loaded = []
    for name, one in (("plain", model), ("fused", fused)):
        if writer == "save_quantized":
            save_quantized(one, tmp_path / name)
        else:
            one.save_pretrained(tmp_path / name)
        loaded.append(load_quantized(tmp_path / name))
    tiny_models.assert_same_state(loaded[1], tiny_models.state(model))
    assert_same(logits(loaded[1]), logits(loaded[0]))
    into = copy.deepcopy(fused)
    layers(into)[0].self_attn.k_proj.scale.zero_()
    load_quantized(tmp_path / "fused", into)
    assert_same(logits(into), logits(fused))


def test_dequantized_models_are_not_fused(llama):
    fused = dequantize_(copy.deepcopy(llama[1]))
    expected = dequantize_(copy.deepcopy(llama[0]))
    assert [type(m) for m in fused.modules()] == [type(m) for m in expected.modules()]
    assert_same(logits(fused), logits(expected))


# transformers around it.


def test_generate_with_a_static_cache(llama):
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    mask = torch.ones_like(TOKENS)
    expected = llama[1].generate(TOKENS, attention_mask=mask, **options)
    static = llama[1].generate(
        TOKENS, attention_mask=mask, cache_implementation="static", **options
    )
    assert_same(static, expected)


@pytest.mark.parametrize("before", [False, True], ids=["then set", "set before"])
def test_generate_with_a_quantized_cache(before):
    model = quantized(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    fused = copy.deepcopy(model)
    answers = []
    for one in (model, fused):
        if before:
            one.set_attn_implementation("liquidgemm")
        if one is fused:
            assert len(fuse_(fused).fused) == 2
        one.set_attn_implementation("liquidgemm")
        answers.append(
            one.generate(
                TOKENS,
                attention_mask=torch.ones_like(TOKENS),
                past_key_values=LiquidCache(one.config, max_cache_len=32, format="int8"),
                max_new_tokens=6,
                do_sample=False,
                disable_compile=True,
            )
        )
    assert fused.config._attn_implementation == "liquidgemm"
    assert_same(*answers)


def test_compiles_in_one_graph(llama):
    layer = layers(llama[1])[0]
    x = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    embed = llama[1].model.rotary_emb(x, torch.arange(4).unsqueeze(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(x, position_embeddings=embed)
        assert_same(compiled(x, position_embeddings=embed), expected)


def test_hidden_states_and_attentions_can_be_asked_for(llama):
    model, fused, _ = llama
    with torch.no_grad():
        results = [m(TOKENS, output_hidden_states=True) for m in (fused, model)]
    shapes = [[tuple(h.shape) for h in result.hidden_states] for result in results]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 3


# Training and adapters.


def test_training_is_refused(llama):
    fused = copy.deepcopy(llama[1]).train()
    with pytest.raises(RuntimeError, match="training: expected False"):
        fused(TOKENS)
    unfuse_(fused)(TOKENS).logits.sum().backward()


def test_derivatives_are_refused(llama):
    fused = copy.deepcopy(llama[1])
    loss = fused(TOKENS).logits.float().sum()
    with pytest.raises(RuntimeError, match="is not differentiable"):
        loss.backward()


def lora(model, targets):
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_adapters_on_merged_layers_are_refused(llama, target):
    fused = lora(copy.deepcopy(llama[1]), [target])
    with pytest.raises(RuntimeError, match=f"{target}: expected the layer that was fused, got"):
        logits(fused)


def test_adapters_on_other_layers_are_taken(llama):
    targets = ["o_proj", "down_proj"]
    fused = lora(copy.deepcopy(llama[1]), targets)
    assert_near(fused, lora(copy.deepcopy(llama[0]), targets))
