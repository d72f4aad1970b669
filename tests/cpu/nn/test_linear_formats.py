"""LiquidLinear with a weight of 6 or 8 bits: held so, saved and loaded as columns stored twice."""

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


BYTES = {6: 3200, 8: 4096}  # of a block
BITS = pytest.mark.parametrize("bits", BYTES)


def weight_of(bits, n=70, k=K, seed=0):
    w = weights(n, k, seed)
    return int8_weight(w) if bits == 8 else liquidgemm.quantize_weight(w, bits=6)


def layer_of(bits, n=70, k=K, seed=0):
    return LiquidLinear.from_quantized(weight_of(bits, n, k, seed), torch.ones(n))


def holds(layer, bits):
    return layer.packed.shape[-1] == BYTES[bits]


def with_residual(weight: QuantizedWeight, x):
    """The product of the two times four bits, as layers computed it before."""
    packed = liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset)
    x8, scale = liquidgemm.quantize_activation(x)
    x8 = nn.functional.pad(x8, (0, -x.shape[-1] % 64))
    x8 = torch.cat((x8, x8[:, weight.columns]), 1)
    return liquidgemm.gemm(x8, scale, packed, weight.scale, torch.ones(len(weight.scale)), x.dtype)


@BITS
@pytest.mark.parametrize("k", [64, 100, 129, 192])
def test_it_is_held_in_its_bits(k, bits):
    """And computes the bits that the columns stored twice gave."""
    weight = weight_of(bits, k=k)
    layer = LiquidLinear.from_quantized(weight, torch.ones(70))
    assert weight.is_int8 == (bits == 8)
    assert weight.is_six_bits == (bits == 6)
    assert layer.packed.shape == (2, -(-k // 64), BYTES[bits])
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


def test_other_weights_stay_as_they_are_too():
    """Residual columns that are not the lower bits of a code are columns."""
    from dataclasses import replace

    weight = weight_of(6)
    qweight, lower, qscale = weight.qweight.clone(), weight.qweight.clone(), weight.qscale.clone()
    qweight[3, -1] |= 0x30  # in the padding: the last feature would be multiplied by it
    lower[3, 64] |= 4
    qscale[5, 0] -= 1
    qoffset = weight.qoffset.clone()
    qoffset[4, 3] = 127
    wide = replace(weight, qweight=weight.qweight.clone(), qoffset=weight.qoffset.clone())
    wide.qweight[0, 0], wide.qweight[0, 64] = wide.qweight[0, 0] | 15, wide.qweight[0, 64] | 3
    wide.qoffset[0, 0] = 255 - 60 * int(weight.qscale[0, 2])  # feasible but for the lower bits
    for other in (
        replace(weight, qweight=qweight),
        replace(weight, qweight=lower),
        replace(weight, qscale=qscale),
        replace(weight, qoffset=qoffset),
        wide,
    ):
        assert not other.is_six_bits
        layer = LiquidLinear.from_quantized(other, torch.ones(70))
        assert layer.packed.shape == (2, 4, 2176)
        x = torch.randn(5, K)
        reference.assert_same(layer(x), with_residual(other, x))


@BITS
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_that_of_older_versions(assign, bits):
    """CHECKLIST 19: old checkpoints load into bytes, new ones hold what old ones held."""
    weight, source = weight_of(bits), layer_of(bits)
    state = source.state_dict()
    assert set(state) == {"qweight", "qscale", "qoffset", "scale", "columns", "bias"}
    for name in ("qweight", "qscale", "qoffset", "scale", "columns"):
        reference.assert_same(state[name], getattr(weight, name))
    target = LiquidLinear(K, 70, augment=128)
    assert target.packed.shape[-1] == 2176
    target.load_state_dict(state, assign=assign)
    assert holds(target, bits)
    x = torch.randn(3, K)
    reference.assert_same(target(x), source(x))
    # And back to columns, of a checkpoint that has some that are no lower halves.
    other = add_residual(weights(), liquidgemm.quantize_weight(weights()), int8.columns_of(K))
    columns = LiquidLinear.from_quantized(other, torch.ones(70))
    target.load_state_dict(columns.state_dict(), assign=assign)
    reference.assert_same(target(x), columns(x))


@BITS
def test_a_layer_of_an_older_pickle_becomes_one(bits):
    """CHECKLIST 19: it holds the columns twice until it is prepared to run."""
    weight, layer = weight_of(bits), layer_of(bits)
    x, expected = torch.randn(3, K), layer_of(bits)(torch.zeros(1, K))
    layer._hold(liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset))
    reference.assert_same(layer(torch.zeros(1, K)), expected)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False).eval()
    assert holds(loaded, bits)
    reference.assert_same(loaded(x), y)
    again = copy.deepcopy(loaded).to(torch.float64).to(torch.float32)
    assert holds(again, bits)
    reference.assert_same(again(x), y)


@BITS
def test_assigned_tensors_go_before_it(bits):
    """CHECKLIST 27: for the time of a call, or for good."""
    one, other = layer_of(bits, seed=1), layer_of(bits, seed=2)
    x = torch.randn(3, K)
    expected = other(x)
    state = other.state_dict()
    reference.assert_same(functional_call(one, state, (x,)), expected)
    assert holds(one, bits)
    for name, tensor in state.items():
        setattr(one, name, tensor)
    reference.assert_same(one(x), expected)
    one.eval()
    assert holds(one, bits)
    reference.assert_same(one(x), expected)


@BITS
def test_meta_layers_become_ones(bits):
    meta = LiquidLinear(K, 70, augment=128, device="meta")
    meta.load_state_dict(layer_of(bits).state_dict(), assign=True)
    assert holds(meta, bits)
    x = torch.randn(3, K)
    reference.assert_same(meta(x), layer_of(bits)(x))


@BITS
def test_layers_are_merged(bits):
    parts = [layer_of(bits, 64, seed=1), layer_of(bits, 128, seed=2)]
    x = torch.randn(3, K)
    expected = torch.cat([part(x) for part in parts], 1)
    merged = MergedLinear(parts)
    assert merged.is_merged
    assert all(holds(part, bits) for part in parts)
    reference.assert_same(merged(x), expected)
    other = add_residual(weights(64), liquidgemm.quantize_weight(weights(64)), int8.columns_of(K))
    columns = LiquidLinear.from_quantized(other, torch.ones(64))
    four = LiquidLinear.from_quantized(liquidgemm.quantize_weight(weights(64)), torch.ones(64))
    for unlike in (columns, four):
        with pytest.raises(ValueError, match="other numbers of bits"):
            MergedLinear([parts[0], unlike])


@BITS
def test_gradients_and_compiled_graphs(bits):
    """CHECKLIST 18, 27."""
    layer = layer_of(bits)
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    w = layer.dequantize()
    reference.assert_same(x.grad, torch.ones(3, 70) @ w)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    reference.assert_same(compiled(x.detach()), layer(x.detach()))
    program = torch.export.export(layer, (x.detach(),))
    reference.assert_same(program.module()(x.detach()), layer(x.detach()))


@pytest.mark.parametrize("settings", [{"keep": ("1",)}, {"bits": {"1": 8}}, {"bits": {"1": 6}}])
def test_settings_and_reports_speak_of_bits(settings):
    model = nn.Sequential(nn.Linear(K, 64), nn.Linear(64, 64))
    report = liquidgemm.quantize_(model, liquidgemm.LiquidConfig(**settings), progress=False)
    bits = {layer.name: layer.bits for layer in report.layers}
    wanted = settings.get("bits", {}).get("1", 8)
    assert bits["1"] == {6: 6.75, 8: 8.5}[wanted]  # and a float per row of 64
    assert holds(model[1], wanted)
    assert model[0].packed.shape[-1] == 2176
