"""Where models can be smoothed: found by structure, tried on copies, or named with the reason."""

import pytest
import torch
from structures import IDS, structures
from torch import nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration.driver import Sites
from liquidgemm.quantization.calibration.sites import Trials, sites_of
from liquidgemm.quantization.calibration.smooth import Site

transformers = pytest.importorskip("transformers")


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64, max_position_embeddings=32, init_std=0.2,
    )  # fmt: skip
    return transformers.OPTModel(config).eval()


def models():
    known = structures()
    for name in ("BERT, classification", "ViT, classification", "T5", "BART"):
        yield name, (known[name].make, known[name].inputs)
    yield "OPT", (opt, {"input_ids": IDS})


QKV = ("q_proj", "k_proj", "v_proj")


def attention(at, norm, value, out, names=QKV):
    return {(norm, tuple(f"{at}.{n}" for n in names)), (f"{at}.{value}", (f"{at}.{out}",))}


# By name of a block; and for layers without any, a part of the reason.
EXPECTED = {
    "BERT, classification": (
        {"bert.encoder.layer.1": {("attention.self.value", ("attention.output.dense",))}},
        {
            "bert.encoder.layer.1.attention.self.query": "comes from outside of its block",
            "bert.encoder.layer.1.intermediate.dense": "LayerNorm gives is used elsewhere too",
            "bert.encoder.layer.1.output.dense": "intermediate.dense gives does not scale",
        },
    ),
    "ViT, classification": (
        {
            "vit.layers.0": attention("attention", "layernorm_before", "v_proj", "o_proj")
            | {("layernorm_after", ("mlp.fc1",))}
        },
        {"vit.layers.0.mlp.fc2": "mlp.fc1 gives does not scale the input of mlp.fc2"},
    ),
    "OPT": (
        {
            "decoder.layers.0": attention("self_attn", "self_attn_layer_norm", "v_proj", "out_proj")
            | {("final_layer_norm", ("fc1",)), ("fc1", ("fc2",))}  # ReLU
        },
        {},
    ),
    "T5": (
        {
            "encoder.block.0": attention(
                "layer.0.SelfAttention", "layer.0.layer_norm", "v", "o", ("q", "k", "v")
            )
            | {
                ("layer.1.layer_norm", ("layer.1.DenseReluDense.wi",)),
                ("layer.1.DenseReluDense.wi", ("layer.1.DenseReluDense.wo",)),
            },
            "decoder.block.1": attention(
                "layer.0.SelfAttention", "layer.0.layer_norm", "v", "o", ("q", "k", "v")
            )
            | {
                ("layer.1.layer_norm", ("layer.1.EncDecAttention.q",)),
                ("layer.1.EncDecAttention.v", ("layer.1.EncDecAttention.o",)),
                ("layer.2.layer_norm", ("layer.2.DenseReluDense.wi",)),
                ("layer.2.DenseReluDense.wi", ("layer.2.DenseReluDense.wo",)),
            },
        },
        {"decoder.block.0.layer.1.EncDecAttention.k": "comes from outside of its block"},
    ),
    "BART": (
        {
            "model.decoder.layers.0": {
                ("self_attn.v_proj", ("self_attn.out_proj",)),
                ("encoder_attn.v_proj", ("encoder_attn.out_proj",)),
            }
        },
        {
            "model.encoder.layers.0.fc2": "fc1 gives does not scale the input of fc2",
            "model.decoder.layers.1.encoder_attn.q_proj": "is used elsewhere too",
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_are_found_by_structure(name, monkeypatch):
    make, inputs = dict(models())[name]
    seen = []
    find = Sites.find
    monkeypatch.setattr(Sites, "find", lambda self: (find(self), seen.append(self)))
    model = make()
    config = LiquidConfig(smooth=True, keep=("*",))
    report = quantize_(model, config, calibration=[inputs], progress=False)
    sites, reasons = EXPECTED[name]
    for block, expected in sites.items():
        assert {(s.source, s.linears) for s in seen[0]._sites[block]} == expected
    smoothed = {
        f"{block}.{linear}"
        for block, of_block in seen[0]._sites.items()
        for site in of_block
        for linear in site.linears
    }
    assert smoothed | set(report.unsmoothed) == set(report.quantized)
    assert not smoothed & set(report.unsmoothed)
    for layer, reason in reasons.items():
        assert reason in report.unsmoothed[layer]
    if reasons:
        assert f"not smoothed {next(iter(report.unsmoothed))}" in str(report)


@pytest.mark.parametrize("name", ["BERT, classification", "OPT"])
def test_outliers_of_what_is_found_go_into_the_weights(name):
    """Of values, ten features stand out by far: their rounding takes the others with it."""
    make, inputs = dict(models())[name]

    def error(smooth):
        model = make()
        for key, parameter in model.named_parameters():
            if key.endswith(("value.weight", "v_proj.weight")):
                parameter.data[::8] *= 300
            if key.endswith(("attention.output.dense.weight", "out_proj.weight")):
                parameter.data[:, ::8] /= 300
        with torch.no_grad():
            expected = model(**inputs)[0]
            config = LiquidConfig(smooth=smooth, keep=("*",))
            quantize_(model, config, calibration=[inputs], progress=False, verify=False)
            return (model(**inputs)[0] - expected).norm() / expected.norm()

    assert error(True) < 0.5 * error(False)


# Pairs that are wrong, in blocks that hardly show it.


class Branch(nn.Module):
    """What a branch adds to the residual stream is far smaller than that."""

    def __init__(self, activation, size=1e-4):
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(64)
        self.up, self.down, self.side = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 8)
        self.activation = activation
        self.up.weight.data *= size
        self.up.bias.data *= size

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(self.activation(self.up(h))), 1e-6 * self.side(h)


def refusal(block, source, linears):
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    return Trials(block, lambda b: list(b(x))).refusal(Site(source, linears))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Softplus()])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_a_pair_around_an_activation_is_refused(activation, size):
    """Also where all that it has seen is so small that it is almost linear there."""
    message = "what up gives does not scale the input of down"
    assert refusal(Branch(activation, size), "up", ("down",)) == message


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Identity()])
def test_a_pair_around_an_activation_that_scales(activation):
    assert refusal(Branch(activation), "up", ("down",)) == ""


def test_a_norm_that_feeds_another_layer_is_refused():
    """Whose share of the output is lost in rounding."""
    assert refusal(Branch(nn.ReLU()), "norm", ("up",)).endswith("used elsewhere too: by side")
    assert refusal(Branch(nn.ReLU()), "norm", ("up", "side")) == ""


def test_a_source_that_cannot_be_asked_is_refused():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x, gate):
            return x * self.weight * gate

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = Gated(), nn.Linear(64, 64)

        def forward(self, x):
            return (self.linear(self.norm(x, 2.0)),)

    assert "norm does not say how it scales: TypeError" in refusal(Block(), "norm", ("linear",))
    x = torch.randn(2, 64)
    found, why = sites_of(Trials(Block(), lambda b: list(b(x))), [["linear"]], [x], [], {})
    assert found == []
    assert "does not say how it scales" in why["linear"]
