"""Factors that smoothing chooses: by the error at the output, through the layer's quantizer."""

import pytest
import torch
from tiny_models import batches, make

from liquidgemm import LiquidConfig, dequantize_weight, quantize_
from liquidgemm.quantization.calibration import smooth
from liquidgemm.quantization.calibration.gptq import int8_weight
from liquidgemm.quantization.calibration.moments import round_activation

K = 128
LAYOUT = (1, 1, K)


def site(tokens=384, seed=0):
    """Inputs of channels of very different sizes, and a token that is huge in every third one."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1.3, K)[torch.randperm(K, generator=generator)]
    x = torch.randn(tokens, K, generator=generator) * size
    x[0, ::3] *= 30
    weights = [torch.randn(n, K, generator=generator) / size.sqrt() for n in (96, 32)]
    return x, weights


def chosen(x, weights, bits=(4, 4), layout=LAYOUT):
    factors, _ = smooth.choose_factors(
        x, x.abs().amax(0), x.square().mean(0), weights, layout, LiquidConfig(), bits
    )
    return factors


def int8_error(x, weights, factors):
    return sum(
        (round_activation(x / factors) @ dequantize_weight(int8_weight(w * factors)).T - x @ w.T)
        .square()
        .sum()
        for w in weights
    ).item()


def test_fitted_factors_are_better_on_other_inputs(monkeypatch):
    x, weights = site()
    fitted = chosen(x, weights, bits=(8, 8))
    monkeypatch.setattr(smooth, "_fitted", lambda start, *_: start)
    by_exponent = chosen(x, weights, bits=(8, 8))
    other, _ = site(tokens=800)
    errors = [int8_error(other[384:], weights, m) for m in (fitted, by_exponent)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 6)])
def test_fitted_factors_are_a_minimum(bits):
    """Of the sum over tokens, rows and groups of squared steps, times what they do."""
    x, weights = site()
    ones, squares = torch.ones(K), x.square().mean(0)
    m = smooth._fitted(ones, x, squares, weights, LAYOUT, bits)

    def error(m):
        total = (x / m).abs().amax(1).div(127).square().mean() * sum(
            (w * m).square().sum() for w in weights
        )
        for i, w in enumerate(weights):
            for columns in [slice(None)] if bits[i] == 8 else [slice(0, 64), slice(64, 128)]:
                part = (w * m)[:, columns]
                step = part.abs().amax(1) / 127
                if bits[i] != 8:
                    step = (part.amax(1) - part.amin(1)) / (2 ** bits[i] - 1)
                total += step.square().sum() * (squares / m.square())[columns].sum()
        return total.item()

    assert error(m) < 0.9 * error(ones)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert error(m * (0.1 * torch.randn(K, generator=generator)).exp()) > error(m)
    assert error(m) == pytest.approx(error(7 * m))  # a common factor is of no account


def test_factors_of_a_group_of_heads_are_one():
    x, weights = site()
    m = chosen(x, weights, layout=(2, 4, 16)).view(2, 4, 16)
    assert torch.equal(m, m[:, :1].expand(2, 4, 16))


def test_layers_are_judged_with_their_own_bits(monkeypatch):
    judged, run = [], smooth.choose_factors
    monkeypatch.setattr(
        smooth, "choose_factors", lambda *args: judged.append(list(args[6])) or run(*args)
    )
    config = LiquidConfig("gptq", smooth=True, keep=("v_proj", "down_proj"), bits={"o_proj": 6})
    quantize_(make(), config, calibration=batches(), progress=False)
    assert judged == 2 * [[4, 4, 8], [6], [4, 4], [8]]
