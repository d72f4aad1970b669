"""Codes that are learned: what they start from, where their gradients go, what they may become."""

from dataclasses import replace

import pytest
import torch
from tiny_models import batches, make
from torch import nn

from liquidgemm import LiquidConfig, dequantize_weight, quantize_
from liquidgemm.formats.liquidquant import GROUP, unpack_nibbles
from liquidgemm.quantization.calibration import driver
from liquidgemm.quantization.calibration.blocks import Call
from liquidgemm.quantization.calibration.codes import LearnedCodes
from liquidgemm.quantization.calibration.simulate import SimulatedLinear
from liquidgemm.quantization.calibration.tune import tune_block
from liquidgemm.quantization.layer import quantize_layer


def in_units(weight):
    return dequantize_weight(replace(weight, scale=torch.ones_like(weight.scale)))


def same_weight(actual, expected):
    for name in ("qweight", "qscale", "qoffset", "scale"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def shifted(base):
    """Every third code one higher where its group has room: as GPTQ's, not the nearest ones."""
    q, k = unpack_nibbles(base.qweight), base.in_features
    top = ((255 - base.qoffset.int()) // base.qscale.int()).clamp(max=15).byte()
    q[:, :k:3] = (q[:, :k:3] + 1).clamp(max=15)
    q = torch.minimum(q, top.repeat_interleave(GROUP, dim=1))
    return replace(base, qweight=q[:, 0::2] | (q[:, 1::2] << 4))


@pytest.mark.parametrize(("k", "augment"), [(64, 0), (100, 0), (192, 0), (192, 64)])
def test_it_starts_from_the_given_codes(k, augment):
    weight = torch.randn(24, k)
    base = shifted(quantize_layer(weight, LiquidConfig(augment=augment))[0])
    codes = LearnedCodes(base, weight)
    assert torch.equal(codes.units(), in_units(base))
    same_weight(codes.weight(), base)
    assert codes.moved() == 0
    off = codes.position - codes.position.round()
    assert off.abs().max() < 0.5
    assert off.unique().numel() > 0.9 * weight.numel()  # no two start at the same place


def test_gradients_are_those_of_the_straight_through_weight():
    weight = torch.randn(8, 100)
    base, _ = quantize_layer(weight, LiquidConfig())
    codes = LearnedCodes(base, weight)
    position = codes.position.clone().requires_grad_()
    step = base.qscale.float().repeat_interleave(GROUP, dim=1)[:, :100]
    rounded = position + (position.round() - position).detach()
    value = codes.units() + step * (rounded - rounded.detach())
    gradient = torch.randn(8, 100)
    value.backward(gradient)
    codes.backward(gradient)
    # Of any size: a loss near 0 has gradients that an optimizer would take for 0.
    size = position.grad.square().mean().sqrt()
    torch.testing.assert_close(codes.position.grad, position.grad / size)
    expected = codes.position.grad.clone()
    codes.backward(1e-12 * gradient)
    torch.testing.assert_close(codes.position.grad, expected)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_whatever_the_gradient_is_every_byte_holds_its_group(direction):
    """Groups at both ends of the range, pushed out of it: q s + a stays in 0 to 255."""
    weight = torch.randn(64, 128)
    weight[:, :64] = weight[:, :64].abs() + 3
    weight[:32] *= -1
    base, _ = quantize_layer(weight, LiquidConfig())
    codes = LearnedCodes(base, weight)
    for _ in range(20):
        codes.backward(torch.full_like(weight, -direction))
        codes.position.add_(codes.position.grad, alpha=-0.1)
        units = codes.units()
        assert units.min() >= -128
        assert units.max() <= 127
    result = codes.weight()  # whose construction checks it as well
    assert torch.equal(in_units(result), units)
    moved = in_units(result) - in_units(base)
    assert (moved * direction).min() >= 0
    assert (moved * direction).sum() > 0


@pytest.mark.parametrize("shape", [(100,), (0, 100), (3, 7, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_while_tuning_is_the_layers(dtype, shape):
    weight, bias, x = torch.randn(40, 100), torch.randn(40), torch.randn(shape)
    layer = SimulatedLinear(quantize_layer(weight, LiquidConfig())[0], bias)
    expected = layer(x)
    inputs, factor = x.clone().requires_grad_(), torch.ones(40, requires_grad=True)
    units = in_units(layer.quantized).to(dtype).requires_grad_()
    layer.learned = units, factor
    with torch.enable_grad():
        y = layer(inputs)
        gradient = torch.randn_like(y)
        y.backward(gradient)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    rounded = driver.round_activation(x)
    of_weight = gradient.view(-1, 40).T @ rounded.view(-1, 100)
    sigma = layer.quantized.scale.unsqueeze(1)
    for actual, wanted in (
        (y, expected),
        (inputs.grad, gradient @ layer.weight),
        (units.grad, of_weight * sigma),
        (factor.grad, (gradient * (expected - bias)).view(-1, 40).sum(0)),
    ):
        assert (actual.float() - wanted).norm() <= bound * wanted.norm()


def test_a_target_follows_its_rows():
    """Smoothing divides the outputs of a layer that is quantized already."""
    weight, factors = torch.randn(40, 64), torch.rand(40) + 0.5
    layer = SimulatedLinear(quantize_layer(weight, LiquidConfig())[0], None)
    layer.original = weight
    before = LearnedCodes(layer.quantized, layer.original).position
    layer.divide_outputs(factors)
    after = LearnedCodes(layer.quantized, layer.original).position
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("learns", [True, False])
def test_codes_make_up_for_each_other(learns):
    """On inputs that no step was taken on, and that share much, as GPTQ would; scales cannot."""
    torch.manual_seed(0)
    weight, shared = torch.randn(48, 160), 2 * torch.randn(8, 160)
    inputs = [torch.randn(1, 128, 160) + torch.randn(1, 128, 8) @ shared for _ in range(8)]
    block = nn.Sequential(SimulatedLinear(quantize_layer(weight, LiquidConfig())[0], None))
    first = block[0].quantized
    if learns:
        block[0].original = weight
    told = []
    ratio = tune_block(
        block,
        [Call((x,), {}) for x in inputs],
        [x @ weight.T for x in inputs],
        100,
        0,
        progress=told.append,
    )
    changed = (block[0].quantized.qweight != first.qweight).float().mean().item()
    assert block[0].original is None
    assert len(told) == 20
    if learns:
        assert ratio < 0.4
        assert 0 < changed < 0.5
    else:
        assert ratio > 0.8
        assert changed == 0
    # What is left behind is the layer that was judged.
    off = (block(inputs[-1]) - inputs[-1] @ weight.T).norm()
    plain = (SimulatedLinear(first, None)(inputs[-1]) - inputs[-1] @ weight.T).norm()
    assert (off / plain) ** 2 == pytest.approx(ratio, rel=0.05)


def test_layers_of_a_block_learn_their_codes(monkeypatch):
    """All of 4 bits; what has more stays."""
    learning, run = [], driver.tune_block

    def watched(block, *args):
        layers = {n: m for n, m in block.named_modules() if isinstance(m, SimulatedLinear)}
        learning.append({name for name, layer in layers.items() if layer.original is not None})
        assert len(layers) == 7
        return run(block, *args)

    monkeypatch.setattr(driver, "tune_block", watched)
    config = LiquidConfig(keep=("k_proj",), bits={"down_proj": 6}, tune=1)
    quantize_(make(), config, calibration=batches(1), progress=False)
    attention = {f"self_attn.{name}_proj" for name in "qvo"}
    assert learning == 2 * [attention | {"mlp.gate_proj", "mlp.up_proj"}]
