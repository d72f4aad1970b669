"""SGLang's linear layers with our weights, for any rank and size of tensor parallelism."""

import importlib.metadata

import pytest
import sglang_layers
import slices
import torch
from sglang_layers import (
    LiquidGemmConfig,
    as_rank,
    config_of,
    down,
    embedding,
    foreign_config,
    gate_up,
    qkv,
    register,
    replicated,
)
from slices import LOGICAL, SIZES, K, alone, finish, load, output, tensors, tokens, weight

from liquidgemm.ops import _library

METHODS = None, "awq", "liquidgemm"


def test_sglang_knows_the_method_everywhere():
    from sglang.srt import server_args
    from sglang.srt.layers import linear as layers
    from sglang.srt.layers import quantization

    register()  # again, as in each process that SGLang forks
    assert quantization.get_quantization_config("liquidgemm") is LiquidGemmConfig
    assert quantization.BASE_QUANTIZATION_METHODS["liquidgemm"] is LiquidGemmConfig
    for name in ("LiquidLinearMethod", "OnlineLiquidLinearMethod", "ForeignLiquidLinearMethod"):
        assert layers.WEIGHT_LOADER_V2_SUPPORTED.count(name) == 1
    assert server_args.QUANTIZATION_CHOICES.count("liquidgemm") == 1


def test_sglang_finds_the_entry_point():
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP

    found = importlib.metadata.entry_points(group=GENERAL_PLUGINS_GROUP, name="liquidgemm")
    if not found:
        pytest.skip("liquidgemm is not installed, or without its entry points")
    assert {entry.load() for entry in found} == {register}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augments", [(0, 0, 0), (64, 64, 64), (64, 0, 128)])
def test_fused_qkv_is_the_slices(size, augments):
    """Four heads of queries and two of keys and values, which more ranks than two share."""
    slices.check_fused_qkv(sglang_layers, size, augments)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("augments", [(0, 0, 0), (64, 0, 128)])
def test_fused_qkv_in_groups_of_32(size, augments):
    slices.check_fused_qkv(sglang_layers, size, augments, 32)


def test_other_groups_of_a_fused_layer_are_refused():
    layers = {f"a.{name}_proj": 0 for name in ("q", "k", "v")}
    config = config_of(layers, format_version=3, group_sizes={"a.k_proj": 32})
    message = "expected the same groups in layers that are fused"
    with as_rank(0, 1), pytest.raises(ValueError, match=message):
        qkv(config, K, 16, 8, 2)


@pytest.mark.parametrize("size", [1, 2])
def test_fused_gate_up_is_the_slices(size):
    """Of layers on disk, and of one that is fused on disk already."""
    x = tokens(K)
    gate, up, both = weight(96, K, 64, 1), weight(96, K, 0, 2), weight(192, K, 64, 3)
    apart = torch.cat((alone(gate, x), alone(up, x)), 1)
    step = 96 // size
    for rank in range(size):
        with as_rank(rank, size):
            layer = gate_up(config_of({"a.gate_proj": 64, "a.up_proj": 0}), K, [96, 96])
            for shard, w in ((1, up), (0, gate)):
                load(layer, tensors(w), shard)
            got = [output(finish(layer), x)]
            layer = gate_up(config_of({"a.gate_up_proj": 64}), K, [96, 96])
            load(layer, tensors(both))
            got.append(output(finish(layer), x))
        for y, whole in zip(got, (apart, alone(both, x)), strict=True):
            parts = [whole[:, s + rank * step : s + (rank + 1) * step] for s in (0, 96)]
            assert torch.equal(y, torch.cat(parts, 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [512, 344])
@pytest.mark.parametrize("kind", ["plain", "augment", "keep", "six", "fine"])
def test_row_parallel_is_the_slice(kind, k, size):
    """CHECKLIST 34: each rank's product is that of its own columns, also within groups."""
    slices.check_row_parallel(sglang_layers, kind, k, size)


def test_replicated_layers_and_dtypes():
    w = weight(96, K, 64)
    layer = replicated(config_of({"a.o_proj": 64}), K, 96)
    load(layer, tensors(w))
    finish(finish(layer))  # SGLang may ask twice
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(output(layer, tokens(K, dtype)), alone(w, tokens(K, dtype)))
    with pytest.raises(RuntimeError, match="start the server anew"):
        layer.qweight.weight_loader(layer.qweight, w.qweight)


@pytest.mark.parametrize("size", [1, 2])
def test_quantized_head(size):
    slices.check_head(sglang_layers, size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["ct-sym", "ct-asym", "awq", "gptq"])
def test_foreign_layers_are_slices_of_the_whole_conversion(name, size):
    slices.check_foreign(sglang_layers, name, size)


@pytest.mark.parametrize("size", [1, 2])
def test_foreign_layers_in_groups_of_32_stay_so(size):
    for name in ("ct-sym", "awq", "gptq"):
        slices.check_foreign(sglang_layers, name, size, 32)


def test_foreign_layers_are_converted_only_if_asked_for_and_once():
    held, settings, _ = slices.foreign_layer("awq")
    asked = [LiquidGemmConfig.override_quantization_method(settings, user) for user in METHODS]
    assert asked == [None, None, "liquidgemm"]
    config = foreign_config(settings, [f"a.down_proj.{key}" for key in held])
    assert config.is_linear_unquantized("a.o_proj")
    assert not config.is_linear_unquantized("a.down_proj")
    with as_rank(0, 1):
        layer = down(config, K, 64)
    load(layer, {"qweight": held["qweight"]})
    with pytest.raises(ValueError, match=r"a\.down_proj\.qzeros: expected it to be loaded"):
        finish(layer)
    collect = layer.scales.weight_loader
    load(layer, {"qzeros": held["qzeros"], "scales": held["scales"]})
    with pytest.raises(RuntimeError, match="liquidgemm import"):
        collect(None, held["scales"])


def test_what_is_missing_or_wrong_is_named():
    w = weight(96, K)
    with as_rank(0, 1):
        for missing in LOGICAL:
            layer = down(config_of({"a.down_proj": 0}), K, 96)
            load(layer, {name: t for name, t in tensors(w).items() if name != missing})
            with pytest.raises(ValueError, match=r"a\.down_proj: .*checkpoint lacks"):
                finish(layer)
        layer = down(config_of({"a.down_proj": 64}), K, 96)
        with pytest.raises(ValueError, match="qweight: expected uint8 with rows of 160"):
            load(layer, tensors(w))


def test_what_is_not_served_is_refused():
    with as_rank(0, 1), pytest.raises(ValueError, match=r"got a\.v_proj in floats"):
        qkv(config_of({"a.q_proj": 0, "a.k_proj": 0}), K, 16, 4, 2)
    with pytest.raises(ValueError, match="does not tell where the checkpoint is"):
        LiquidGemmConfig.from_config({"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="got 'fp8'"):
        foreign_config({"quant_method": "fp8"}, ["a.o_proj.weight"])
    with pytest.raises(ValueError, match=r"got \['surprise'\]"):
        config_of({}, surprise=1)
    table = embedding("VocabParallelEmbedding")
    with pytest.raises(ValueError, match=r"a\.embed: embeddings cannot"):
        config_of({"a.embed": 0}).get_quant_method(table, "a.embed")
    with pytest.raises(ValueError, match=r"kv_b_proj: MLA"):
        config_of({"a.kv_b_proj": 0}).get_quant_method(replicated(None, 64, 64), "a.kv_b_proj")


def test_layers_that_stay_in_floats():
    config = config_of({"a.o_proj": 0})
    with as_rank(0, 1):
        layer = down(config, K, 96)
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"
    assert "1 x down_proj (so in the checkpoint)" in config.summary.lines(torch.device("cpu"))[0]
    assert config.get_quant_method(embedding(), "lm_head") is None


def test_a_gpu_that_is_no_hopper_gets_the_reason(monkeypatch):
    monkeypatch.setattr(_library, "load_libraries", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    with as_rank(0, 1), pytest.raises(ValueError, match=r"got 10\.0 \(NVIDIA B200\): serve the f"):
        down(config_of({"a.down_proj": 0}), K, 96)
