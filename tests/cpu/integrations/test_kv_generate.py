"""transformers' generate over a quantized KV cache, through its own interfaces."""

import copy

import pytest
import torch
from tiny_llama import attention_model

import liquidgemm
from liquidgemm.integrations.transformers_cache import LiquidCache

PROMPT = torch.arange(2 * 13).view(2, 13) * 7 % 90 + 3
NEW = 6


def liquid(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("liquidgemm")
    return model


@pytest.fixture(scope="module")
def llama():
    return attention_model()


def generated(model, ids=PROMPT, cache=None, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True} | options
    options |= {"return_dict_in_generate": True, "past_key_values": cache}
    found = model.generate(ids, **options)
    return found.sequences, torch.stack(found.logits, 1)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


# Beside transformers' float32 cache, in a model of random weights.
@pytest.mark.parametrize(
    ("format", "error"), [("bfloat16", 0.005), ("int8", 0.02), ("fp8", 0.06), ("int4", 0.25)]
)
def test_generate(llama, format: str, error: float) -> None:
    """Every step sees what the cache holds of all before: the logits are near the float ones."""
    tokens, expected = generated(llama)
    cache = LiquidCache(llama.config, 32, format)
    model = liquid(llama)
    with torch.no_grad():
        logits = [model(PROMPT, past_key_values=cache).logits[:, -1]]
        logits += [
            model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1]
            for i in range(PROMPT.shape[1], tokens.shape[1] - 1)
        ]
    found = relative_error(torch.stack(logits, 1), expected)
    assert found < error
    if format != "bfloat16":
        assert found > error / 50  # it is quantized, and it is looked at
    assert cache.get_seq_length() == tokens.shape[1] - 1


def test_generate_gives_the_tokens_of_steps_by_hand(llama) -> None:
    model = liquid(llama)
    tokens, logits = generated(model, cache=LiquidCache(llama.config, 32))
    cache = LiquidCache(llama.config, 32)
    ids = PROMPT
    with torch.no_grad():
        for i in range(NEW):
            step = model(ids, past_key_values=cache).logits[:, -1]
            assert relative_error(step, logits[:, i]) < 1e-5
            ids = step.argmax(-1, keepdim=True)
            assert torch.equal(ids, tokens[:, PROMPT.shape[1] + i : PROMPT.shape[1] + i + 1])


def test_padding_on_the_left(llama) -> None:
    """A prompt that is padded gives what it gives alone."""
    model = liquid(llama)
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[1, :4], mask[1, :4] = 0, 0
    _, together = generated(model, ids, LiquidCache(llama.config, 32), attention_mask=mask)
    _, first = generated(model, PROMPT[:1], LiquidCache(llama.config, 32))
    _, second = generated(model, PROMPT[1:, 4:], LiquidCache(llama.config, 32))
    assert relative_error(together, torch.cat((first, second))) < 0.01


def test_a_prompt_in_chunks(llama) -> None:
    """Later chunks see the earlier ones as they are stored."""
    model = liquid(llama)
    cache, whole = LiquidCache(llama.config, 64), LiquidCache(llama.config, 64)
    ids = torch.cat((PROMPT, PROMPT.flip(1), PROMPT), 1)
    with torch.no_grad():
        expected = model(ids, past_key_values=whole).logits[:, -1]
        for chunk in ids.split([3, 2, 34], 1):  # 2 tokens by the kernel, 34 by SDPA
            logits = model(chunk, past_key_values=cache).logits[:, -1]
    assert relative_error(logits, expected) < 0.02


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Phi3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 64}),
    ],
)
def test_families(kind: str, changes: dict) -> None:
    """Windows, softcaps, norms of queries and keys: near transformers' eager attention."""
    model = attention_model(kind=kind, **changes)
    model.set_attn_implementation("eager")
    tokens, expected = generated(model)
    cache = LiquidCache(model.config, 32)
    other = liquid(model)
    with torch.no_grad():
        logits = [other(PROMPT, past_key_values=cache).logits[:, -1]]
        logits += [
            other(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1]
            for i in range(PROMPT.shape[1], tokens.shape[1] - 1)
        ]
    assert relative_error(torch.stack(logits, 1), expected) < 0.03


def test_a_compiled_step_is_the_same() -> None:
    """CHECKLIST 18: one graph, whatever the length."""
    model = liquid(attention_model(num_hidden_layers=1))
    caches = [LiquidCache(model.config, 32) for _ in range(2)]
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for cache in caches:
            model(PROMPT, past_key_values=cache)
        for i in range(3):
            ids = PROMPT[:, i : i + 1]
            expected = model(ids, past_key_values=caches[0]).logits
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                assert torch.equal(step(ids, past_key_values=caches[1]).logits, expected)


def refused(kind: type[Exception], message: str):
    return pytest.raises(kind, match=message)


@pytest.mark.parametrize("first", ["fuse_", "attention"])
def test_with_fused_layers_and_a_head_of_8_bits(llama, first: str) -> None:
    """All that docs/decode.md switches on, in either order: the tokens of the layers one by one."""
    quantized = copy.deepcopy(llama).bfloat16()
    config = liquidgemm.LiquidConfig(method="rtn", head="int8")
    liquidgemm.quantize_(quantized, config, progress=False, verify=False)
    tokens, expected = generated(liquid(quantized), cache=LiquidCache(llama.config, 32))
    fused = liquid(quantized) if first == "attention" else quantized
    assert len(liquidgemm.fuse_(fused).fused) == llama.config.num_hidden_layers
    fused = liquid(fused)
    cache = LiquidCache(llama.config, 32)
    found, logits = generated(fused, cache=cache)
    assert torch.equal(found, tokens)
    assert relative_error(logits.float(), expected.float()) < 0.01
    assert cache.get_seq_length() == tokens.shape[1] - 1
    plain = liquidgemm.unfuse_(copy.deepcopy(fused))
    again = generated(plain, cache=LiquidCache(llama.config, 32))[1]
    assert torch.equal(again, expected)


def test_what_is_refused(llama) -> None:
    """CHECKLIST 28: in words, what it cannot do."""
    model = liquid(llama)

    def cache(size: int = 32) -> LiquidCache:
        return LiquidCache(llama.config, size)

    with refused(ValueError, "expected a LiquidCache"):
        generated(model)
    with refused(NotImplementedError, "got beams"):
        generated(model, cache=cache(), num_beams=2)
    mask = torch.ones_like(PROMPT)
    mask[0, -1] = 0
    with refused(ValueError, "padding on the left only"):
        model(PROMPT, attention_mask=mask, past_key_values=cache())
    with refused(ValueError, "max_cache_len: expected at least 13, got 8"):
        model(PROMPT, past_key_values=cache(8))
    with refused(ValueError, "format: expected"):
        LiquidCache(llama.config, 32, "int3")
    with refused(ValueError, "max_cache_len: expected at least 1"):
        LiquidCache(llama.config, 0)
    used = cache()
    model(PROMPT, past_key_values=used)
    with refused(ValueError, "expected 2 sequences"):
        model(PROMPT[:1], past_key_values=used)
    with refused(AttributeError, r"model.set_attn_implementation\('liquidgemm'\)"):
        llama(PROMPT, past_key_values=cache())


def test_reset_and_crop(llama) -> None:
    model, cache = liquid(llama), LiquidCache(llama.config, 32)
    with torch.no_grad():
        first = model(PROMPT, past_key_values=cache).logits
        cache.crop(-3)
        again = model(PROMPT[:, -3:], past_key_values=cache).logits
        assert relative_error(again, first[:, -3:]) < 0.02
        cache.reset()
        assert torch.equal(model(PROMPT, past_key_values=cache).logits, first)
