"""vLLM's linear layers with our weights, for any rank and size of tensor parallelism."""

import pickle
import re

import engine
import pytest
import slices
import torch
from engine import as_rank, config_of, down, gate_up, qkv
from slices import (
    LOGICAL,
    SIZES,
    K,
    alone,
    finish,
    foreign_layer,
    load,
    output,
    tensors,
    tokens,
    weight,
)

from liquidgemm import quantize_activation
from liquidgemm.formats import int8
from liquidgemm.integrations.serving.foreign import foreign_layers
from liquidgemm.integrations.serving.layout import Slice
from liquidgemm.integrations.serving.tensors import CODES
from liquidgemm.integrations.vllm import fusion
from liquidgemm.integrations.vllm.parameters import dummy_codes
from liquidgemm.weights.weight import Form


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augments", [(0, 0, 0), (64, 64, 64), (64, 0, 128)])
def test_fused_qkv_is_the_slices(size, augments):
    """Four heads of queries and two of keys and values, which more ranks than two share."""
    slices.check_fused_qkv(engine, size, augments)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("augments", [(0, 0, 0), (64, 0, 128)])
def test_fused_qkv_in_groups_of_32(size, augments):
    slices.check_fused_qkv(engine, size, augments, 32)


def test_other_groups_of_a_fused_layer_are_refused():
    layers = {f"a.{name}_proj": 0 for name in ("q", "k", "v")}
    config = config_of(layers, format_version=3, group_sizes={"a.k_proj": 32})
    message = "expected the same groups in layers that are fused"
    with as_rank(0, 1), pytest.raises(ValueError, match=message):
        qkv(config, K, 16, 8, 2)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_are_fused_on_disk(size):
    """As in Phi-3: one weight, one list of residual columns, for q, k and v or gate and up."""
    heads, kv_heads, width = 4, 2, 16
    x = tokens(K)
    both, three = weight(192, K, 64, 1), weight((heads + 2 * kv_heads) * width, K, 64, 2)
    y_both, y_three = alone(both, x), alone(three, x)
    for rank in range(size):
        with as_rank(rank, size):
            layer = gate_up(config_of({"a.gate_up_proj": 64}), K, [96, 96])
            load(layer, tensors(both))
            y = output(finish(layer), x)
            step = 96 // size
            parts = [y_both[:, s + rank * step : s + (rank + 1) * step] for s in (0, 96)]
            assert torch.equal(y, torch.cat(parts, 1))
            layer = qkv(config_of({"a.qkv_proj": 64}), K, width, heads, kv_heads)
            load(layer, tensors(three))
            y = output(finish(layer), x)
            q, kv = heads * width // size, kv_heads * width // size
            starts = [rank * q, heads * width + rank * kv, (heads + kv_heads) * width + rank * kv]
            parts = [y_three[:, s : s + n] for s, n in zip(starts, (q, kv, kv), strict=True)]
            assert torch.equal(y, torch.cat(parts, 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [512, 344])
@pytest.mark.parametrize("kind", ["plain", "augment", "keep", "six", "fine"])
def test_row_parallel_is_the_slice(kind, k, size):
    """CHECKLIST 34: each rank's product is that of its own columns, also within groups."""
    slices.check_row_parallel(engine, kind, k, size)


@pytest.mark.parametrize("size", [1, 2])
def test_quantized_head(size):
    slices.check_head(engine, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [K, 200])
def test_dtypes_and_padding(dtype, k):
    w, x = weight(96, k, 64), tokens(k, dtype)
    with as_rank(0, 1):
        layer = down(config_of({"a.down_proj": 64}), k, 96, dtype)
        load(layer, tensors(w))
        y = output(finish(layer), x)
    assert y.dtype == dtype
    assert torch.equal(y, alone(w, x))


def test_a_packed_layer_keeps_the_names_that_lora_and_reload_look_for():
    w = weight(96, K, 64)
    with as_rank(0, 1):
        layer = down(config_of({"a.down_proj": 64}), K, 96)
        load(layer, tensors(w))
        finish(finish(layer))  # vLLM may ask twice
    assert set(dict(layer.named_parameters())) == {"qweight", "scale", "columns"}
    with pytest.raises(RuntimeError, match="reload_weights"):
        load(layer, {"qweight": w.qweight})


def test_what_is_missing_or_wrong_is_named():
    w = weight(96, K)
    for missing in LOGICAL:
        with as_rank(0, 1):
            layer = down(config_of({"a.down_proj": 0}), K, 96)
            load(layer, {name: t for name, t in tensors(w).items() if name != missing})
            with pytest.raises(ValueError, match=r"a\.down_proj: .*checkpoint lacks"):
                finish(layer)
    with as_rank(0, 1):
        layer = down(config_of({"a.down_proj": 64}), K, 96)
        with pytest.raises(ValueError, match="qweight: expected uint8 with rows of 160"):
            load(layer, tensors(w))
        load(layer, tensors(weight(96, K, 64)) | {"columns": torch.full((64,), K).int()})
        with pytest.raises(ValueError, match="columns: expected 0 to 255"):
            finish(layer)


def test_mixed_layers_are_refused():
    with as_rank(0, 1), pytest.raises(ValueError, match=r"got a\.v_proj in floats"):
        qkv(config_of({"a.q_proj": 0, "a.k_proj": 0}), K, 16, 4, 2)


def test_layers_that_stay_in_floats():
    with as_rank(0, 1):
        layer = down(config_of({"a.o_proj": 0}), K, 96)
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


def test_config_travels_between_processes():
    config = config_of({"a.down_proj": 64})
    assert pickle.loads(pickle.dumps(config)).names == config.names


def test_settings_that_are_not_understood_are_refused():
    with pytest.raises(ValueError, match="newer liquidgemm"):
        config_of({}, format_version=99)
    with pytest.raises(ValueError, match=r"got \['surprise'\]"):
        config_of({}, surprise=1)
    with pytest.raises(ValueError, match="multiple of 64"):
        config_of({"a": 1})


FORMATS = ("ct-sym", "ct-asym", "awq", "gptq")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_foreign_layers_are_slices_of_the_whole_conversion(name, size):
    slices.check_foreign(engine, name, size)


@pytest.mark.parametrize("size", [1, 2])
def test_foreign_layers_in_groups_of_32_stay_so(size):
    for name in ("ct-sym", "awq", "gptq"):
        slices.check_foreign(engine, name, size, 32)


def test_foreign_settings_that_the_grid_cannot_hold_are_refused():
    held, settings, _ = foreign_layer("gptq")
    keys = [f"a.b.{key}" for key in (*held, "g_idx")]
    order = {"g_idx": torch.arange(K).flip(0).int() // 64}

    def read(change: dict):
        layers = foreign_layers({"config.json": settings | change}, keys)
        return layers["a.b"].read(held | order)

    refused = ({"desc_act": True}, {"bits": 8}, {"surprise": 1}, {"quant_method": "fp8"})
    for change, what in zip(refused, ("out of order", "bits", "surprise", "fp8"), strict=True):
        with pytest.raises(ValueError, match=what):
            read(change)


def test_foreign_layers_are_loaded_once_and_whole():
    held, settings, _ = foreign_layer("awq")
    with as_rank(0, 1):
        config = engine.foreign_config(settings, [f"a.down_proj.{key}" for key in held])
        layer = down(config, K, 64)
        load(layer, {"qweight": held["qweight"]})
        with pytest.raises(ValueError, match=r"a\.down_proj\.qzeros: expected it to be loaded"):
            finish(layer)
        collect = layer.scales.weight_loader
        load(layer, {"qzeros": held["qzeros"], "scales": held["scales"]})
        with pytest.raises(RuntimeError, match="liquidgemm import"):
            collect(None, held["scales"])


def test_activations_that_are_quantized_already():
    """What a fused producer hands over gives the bits of the product with the floats."""
    activation = fusion.QuantizedActivation
    if activation is None:
        pytest.skip(fusion.state())
    w, x = weight(96, K, 64), tokens(K)
    with as_rank(0, 1):
        layer = down(config_of({"a.down_proj": 64}), K, 96)
        load(layer, tensors(w))
        finish(layer)
    x8, scale = quantize_activation(x)
    given = activation(x8, scale, x.dtype, x.shape, fusion.kInt8DynamicTokenSym)
    assert torch.equal(output(layer, given), output(layer, x))
    with pytest.raises(RuntimeError, match="INT8 with a scale per token"):
        output(layer, activation(x8, scale, x.dtype, x.shape, None))


def test_the_mlp_of_vllm_is_fused_or_says_why_not():
    if (state := fusion.state()) != "yes":
        assert re.match(r"no: this (vLLM|liquidgemm) ", state)
        pytest.skip(state)
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion.fused_act_quant import maybe_fused_act_quant

    w, x = weight(96, K), tokens(2 * K)
    with as_rank(0, 1):
        layer = down(config_of({"a.down_proj": 0}), K, 96)
        load(layer, tensors(w))
        finish(layer)
        given = maybe_fused_act_quant(SiluAndMul(), x, layer)
    assert isinstance(given, fusion.QuantizedActivation)
    gate, up = x.chunk(2, -1)
    wanted = alone(w, torch.nn.functional.silu(gate.float()).to(x.dtype) * up)
    assert (output(layer, given) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("start", [0, 64])
def test_dummy_weights_of_8_bits_are_of_8_bits(start):
    """What `--load-format dummy` makes of a layer all of whose columns are stored twice."""
    part = Slice(start, K - start, K)
    codes = [dummy_codes(72, name, part, (Form(K),)) for name in CODES]
    assert codes[0].unique().numel() > 200
    assert int8.is_int8(*codes, int8.columns_of(K - start), K - start)
    assert not int8.is_int8(*codes, int8.columns_of(K - start), K - start - 64)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tensors_of_other_rows_or_dtypes_are_refused(size):
    """vLLM would take the rows that it needs of more, and round scales."""
    q, k, both, own = weight(128, K, seed=1), weight(32, K), weight(96, K), weight(72, K, 64)
    with as_rank(size - 1, size):
        fused = qkv(config_of({"a.q_proj": 0, "a.k_proj": 0, "a.v_proj": 0}), K, 16, 8, 2)
        merged = gate_up(config_of({"a.gate_proj": 0, "a.up_proj": 0}), K, [96, 96])
        single = down(config_of({"a.down_proj": 64}), K, 72)
    # More ranks than heads of keys share them.
    for layer, w, shard in (
        (fused, q, "q"),
        (fused, k, "k"),
        (merged, both, 1),
        (single, own, None),
    ):
        load(layer, tensors(w), shard)
        for name in LOGICAL:
            tensor = tensors(w)[name]
            twice, half = torch.cat((tensor, tensor)), tensor[: len(tensor) // 2]
            for wrong in (twice, half, tensor.to(torch.float16)):
                expected = (
                    rf"{name}: expected {tensor.dtype}? ?.*{len(tensor)} rows, got {wrong.dtype}"
                )
                with pytest.raises(ValueError, match=expected):
                    load(layer, {name: wrong}, shard)
