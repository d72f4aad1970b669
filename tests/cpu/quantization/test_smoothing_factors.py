"""Factors that smoothing chooses: by the error at the output, through the layer's quantizer."""

import torch
from tiny_models import batches, make

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration import smooth

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


def test_one_token_does_not_decide_what_a_channel_needs():
    """It makes the largest of every third channel: their mean squares are those of the others."""
    x, weights = site(tokens=2048)
    m = chosen(x, weights, bits=(8, 8))
    wmax = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    by_size = {
        name: [smooth._factors(size, wmax, alpha, LAYOUT) for alpha in smooth._ALPHAS]
        for name, size in (("max", x.abs().amax(0)), ("mean square", x.square().mean(0).sqrt()))
    }
    assert [name for name, found in by_size.items() if any(torch.equal(m, f) for f in found)] == [
        "mean square"
    ]
