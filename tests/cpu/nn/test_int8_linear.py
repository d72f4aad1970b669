"""LiquidLinear with an INT8 weight: held in 8 bits, saved and loaded as it was before."""

import copy
import io

import pytest
import reference
import torch
from torch import nn
from torch.func import functional_call

import liquidgemm
from liquidgemm import LiquidLinear, MergedLinear, QuantizedWeight
from liquidgemm.formats import int8
from liquidgemm.quantization.calibration.gptq import add_residual, int8_weight

K = 100


def weights(n=70, k=K, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def layer_of(n=70, k=K, seed=0):
    return LiquidLinear.from_quantized(int8_weight(weights(n, k, seed)), torch.ones(n))


def with_residual(weight: QuantizedWeight, x):
    """The product of the two times four bits, as layers computed it before."""
    packed = liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset)
    x8, scale = liquidgemm.quantize_activation(x)
    x8 = nn.functional.pad(x8, (0, -x.shape[-1] % 64))
    x8 = torch.cat((x8, x8[:, weight.columns]), 1)
    return liquidgemm.gemm(x8, scale, packed, weight.scale, torch.ones(len(weight.scale)), x.dtype)


@pytest.mark.parametrize("k", [64, 100, 129, 192])
def test_it_is_held_in_8_bits(k):
    """And computes the bits that the columns stored twice gave."""
    weight = int8_weight(weights(k=k))
    layer = LiquidLinear.from_quantized(weight, torch.ones(70))
    assert weight.is_int8
    assert layer.packed.shape == (2, -(-k // 64), int8.BLOCK_BYTES)
    x = torch.randn(5, k)
    reference.assert_same(layer(x), with_residual(weight, x))
    tokens = liquidgemm.QuantizedTokens(*liquidgemm.quantize_activation(x), x.dtype)
    reference.assert_same(layer(tokens), layer(x))
    for name in ("qweight", "qscale", "qoffset", "scale", "columns"):
        reference.assert_same(getattr(layer, name), getattr(weight, name))
    reference.assert_same(layer.dequantize(), liquidgemm.dequantize_weight(weight))


def test_other_weights_stay_as_they_are():
    """Residual columns that are not the lower half of a byte are columns."""
    weight = int8_weight(weights())
    qweight, qscale, columns = weight.qweight.clone(), weight.qscale.clone(), weight.columns.clone()
    qweight[3, -1] |= 0x30  # in the padding: the last feature would be multiplied by it
    qscale[5, 2] = 2
    columns[0] = 1
    base = liquidgemm.quantize_weight(weights())
    calibrated = add_residual(weights(), base, int8.columns_of(K))
    from dataclasses import replace

    for other in (
        calibrated,
        replace(weight, qweight=qweight),
        replace(weight, qscale=qscale),
        replace(weight, columns=columns),
    ):
        assert not other.is_int8
        layer = LiquidLinear.from_quantized(other, torch.ones(70))
        assert layer.packed.shape == (2, 4, 2176)
        x = torch.randn(5, K)
        reference.assert_same(layer(x), with_residual(other, x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_that_of_older_versions(assign):
    """CHECKLIST 19: old checkpoints load into INT8, new ones hold what old ones held."""
    weight, source = int8_weight(weights()), layer_of()
    state = source.state_dict()
    assert set(state) == {"qweight", "qscale", "qoffset", "scale", "columns", "bias"}
    for name in ("qweight", "qscale", "qoffset", "scale", "columns"):
        reference.assert_same(state[name], getattr(weight, name))
    target = LiquidLinear(K, 70, augment=128)
    assert target.packed.shape[-1] == 2176
    target.load_state_dict(state, assign=assign)
    assert int8.is_packed(target.packed)
    x = torch.randn(3, K)
    reference.assert_same(target(x), source(x))
    # And back to columns, of a checkpoint that has some that are no lower halves.
    other = add_residual(weights(), liquidgemm.quantize_weight(weights()), int8.columns_of(K))
    columns = LiquidLinear.from_quantized(other, torch.ones(70))
    target.load_state_dict(columns.state_dict(), assign=assign)
    reference.assert_same(target(x), columns(x))


def test_a_layer_of_an_older_pickle_becomes_one():
    """CHECKLIST 19: it holds the columns twice until it is prepared to run."""
    weight, layer = int8_weight(weights()), layer_of()
    x, expected = torch.randn(3, K), layer_of()(torch.zeros(1, K))
    layer._hold(liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset))
    reference.assert_same(layer(torch.zeros(1, K)), expected)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False).eval()
    assert int8.is_packed(loaded.packed)
    reference.assert_same(loaded(x), y)
    again = copy.deepcopy(loaded).to(torch.float64).to(torch.float32)
    assert int8.is_packed(again.packed)
    reference.assert_same(again(x), y)


def test_assigned_tensors_go_before_it():
    """CHECKLIST 27: for the time of a call, or for good."""
    one, other = layer_of(seed=1), layer_of(seed=2)
    x = torch.randn(3, K)
    expected = other(x)
    state = other.state_dict()
    reference.assert_same(functional_call(one, state, (x,)), expected)
    assert int8.is_packed(one.packed)
    for name, tensor in state.items():
        setattr(one, name, tensor)
    reference.assert_same(one(x), expected)
    one.eval()
    assert int8.is_packed(one.packed)
    reference.assert_same(one(x), expected)


def test_meta_layers_become_ones():
    meta = LiquidLinear(K, 70, augment=128, device="meta")
    meta.load_state_dict(layer_of().state_dict(), assign=True)
    assert int8.is_packed(meta.packed)
    x = torch.randn(3, K)
    reference.assert_same(meta(x), layer_of()(x))


def test_layers_are_merged():
    parts = [layer_of(64, seed=1), layer_of(128, seed=2)]
    x = torch.randn(3, K)
    expected = torch.cat([part(x) for part in parts], 1)
    merged = MergedLinear(parts)
    assert merged.is_merged
    assert all(int8.is_packed(part.packed) for part in parts)
    reference.assert_same(merged(x), expected)
    other = add_residual(weights(64), liquidgemm.quantize_weight(weights(64)), int8.columns_of(K))
    columns = LiquidLinear.from_quantized(other, torch.ones(64))
    with pytest.raises(ValueError, match="INT8 weights"):
        MergedLinear([parts[0], columns])


def test_gradients_and_compiled_graphs():
    """CHECKLIST 18, 27."""
    layer = layer_of()
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    w = layer.dequantize()
    reference.assert_same(x.grad, torch.ones(3, 70) @ w)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    reference.assert_same(compiled(x.detach()), layer(x.detach()))
    program = torch.export.export(layer, (x.detach(),))
    reference.assert_same(program.module()(x.detach()), layer(x.detach()))


def test_keep_and_reports_speak_of_8_bits(tmp_path):
    model = nn.Sequential(nn.Linear(K, 64), nn.Linear(64, 64))
    report = liquidgemm.quantize_(model, liquidgemm.LiquidConfig(keep=("1",)), progress=False)
    bits = {layer.name: layer.bits for layer in report.layers}
    assert bits["1"] == 8.5  # 8 and a float per row of 64
    assert int8.is_packed(model[1].packed)
    assert not int8.is_packed(model[0].packed)
