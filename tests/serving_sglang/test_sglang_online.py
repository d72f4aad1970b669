"""SGLang's linear layers of a float checkpoint, quantized as soon as they are loaded."""

from types import SimpleNamespace

import pytest
import sglang_layers  # the stand-ins, before SGLang
import torch
from slices import K, alone, finish, load, output, tokens

from liquidgemm import LiquidConfig
from liquidgemm.quantization.layer import quantize_layer

FIELDS = {"augment": {"down_proj": 64}, "keep": ["q_proj", "k_proj", "v_proj"]}


def config_of(tied=None, **fields):
    model = SimpleNamespace() if tied is None else SimpleNamespace(tie_word_embeddings=tied)
    own = {"quant_method": "liquidgemm", "config": fields, "hf_config": model}
    return sglang_layers.LiquidGemmConfig.from_config(own)


def floats(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(weight: torch.Tensor, name: str, x: torch.Tensor, fields: dict) -> torch.Tensor:
    return alone(quantize_layer(weight, LiquidConfig(**fields), name)[0], x)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("fields", [{}, FIELDS])
def test_layers_are_quantized_with_the_last_part_of_their_weight(fields, size):
    x, parts = tokens(K), {"q": floats(128, K), "k": floats(32, K, 1), "v": floats(32, K, 2)}
    ranks = [torch.cat([part.chunk(size)[rank] for part in parts.values()]) for rank in range(size)]
    for rank in range(size):
        with sglang_layers.as_rank(rank, size):
            layer = sglang_layers.qkv(config_of(**fields), K, 16, 8, 2)
            assert layer.weight.numel() == 0, "no memory before something comes"
            place = layer.weight
            for shard, tensor in parts.items():
                assert "qweight" not in layer._parameters
                load(layer, {"weight": tensor}, shard)
            assert place.numel() == 0, "none after it"
        wanted = expected(ranks[rank], "a.q_proj", x, fields)
        assert torch.equal(output(finish(layer), x), wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_is_quantized_by_its_own_columns(size):
    w, x = floats(96, 2 * K), tokens(2 * K)
    for rank in range(size):
        own = slice(rank * 2 * K // size, (rank + 1) * 2 * K // size)
        with sglang_layers.as_rank(rank, size):
            layer = sglang_layers.down(config_of(**FIELDS), 2 * K, 96)
            load(layer, {"weight": w})
            y = output(finish(layer), x[:, own])
        assert torch.equal(y, expected(w[:, own], "a.down_proj", x[:, own], FIELDS))


def test_fused_on_disk():
    w, x = floats(192, K), tokens(K)
    with sglang_layers.as_rank(0, 1):
        layer = sglang_layers.gate_up(config_of(), K, [96, 96])
        load(layer, {"weight": w})
    assert "qweight" in layer._parameters
    assert torch.equal(output(finish(layer), x), expected(w, "a.gate_proj", x, {}))
    with pytest.raises(RuntimeError, match="start the server anew"):
        layer.qweight.weight_loader(layer.qweight, w)


@pytest.mark.parametrize("fields", [{"skip": []}, {"head": "int8"}])
def test_a_head_is_quantized(fields):
    """Also one that the patterns of skip name, where an INT8 head is asked for."""
    w, x = floats(200, K), tokens(K)
    with sglang_layers.as_rank(0, 1):
        layer = sglang_layers.head(config_of(tied=False, **fields), 200, K)
        load(layer, {"weight": w})
    keep = ["lm_head"] if "head" in fields else []
    y = output(finish(layer), x)[:, :200]
    assert torch.equal(y, expected(w, "lm_head", x, fields | {"keep": keep}))


def test_what_is_missing_is_named():
    with sglang_layers.as_rank(0, 1):
        layer = sglang_layers.gate_up(config_of(), K, [96, 96])
        with pytest.raises(ValueError, match=r"a\.gate_proj, a\.up_proj: expected weights"):
            finish(layer)
        load(layer, {"weight": floats(96, K)}, 0)
        with pytest.raises(ValueError, match=r"a\.gate_proj, a\.up_proj: "):
            finish(layer)


def test_what_stays_in_floats_says_why():
    config = config_of(skip=["down_proj", "lm_head"])
    with sglang_layers.as_rank(0, 1):
        sglang_layers.down(config, K, 96)
        sglang_layers.replicated(config, K, 32)
    assert config.get_quant_method(sglang_layers.embedding(), "lm_head") is None
    (line,) = config.summary.lines(torch.device("cpu"))
    for reason in ("pattern 'down_proj'", "fewer than 64 rows", "pattern 'lm_head'"):
        assert reason in line


def test_what_cannot_be_quantized_while_loading_is_refused():
    for fields, message in (
        ({"smooth": True}, "smooth: expected False"),
        ({"method": "gptq"}, "method: expected 'search' or 'rtn'"),
        ({"head": "int8", "tied": True}, "head: expected 'float'"),
        ({"head": "int8", "tied": None}, "does not say"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(**fields)
    with sglang_layers.as_rank(0, 1), pytest.raises(ValueError, match="to be treated alike"):
        sglang_layers.qkv(config_of(keep=["q_proj"]), K, 16, 8, 2)
    layer = sglang_layers.experts()
    assert config_of(skip=["*experts"]).get_quant_method(layer, "a.experts") is None
    with pytest.raises(ValueError, match="bits: expected 4"):
        config_of(bits={"*": 6}).get_quant_method(layer, "a.experts")
