"""Decoder layers that are not fused, or only in parts, and why."""

import copy

import pytest
import torch
from test_fuse import assert_near, layers, logits, quantized
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, fuse_, unfuse_


def test_residual_columns_that_differ_are_not_merged():
    model = quantized(config=LiquidConfig(augment=64))
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    assert len(report.fused) == 2
    assert "their residual columns differ" in report.apart["model.layers.0.self_attn"]
    assert "not merged in model.layers.0.self_attn" in str(report)
    assert_near(fused, model)


def test_layers_that_agree_are_merged_among_themselves():
    model = quantized(config=LiquidConfig(keep=("k_proj", "v_proj")))
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    attention = layers(fused)[0].self_attn
    (merged,) = attention.liquid_projections.merged
    assert merged.parts == (attention.k_proj, attention.v_proj)
    assert set(report.apart) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert_near(fused, model)


def test_sizes_that_do_not_fill_panels():
    model = quantized(intermediate_size=136)
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    assert len(report.fused) == 2
    assert report.apart["model.layers.0.mlp"] == "out_features are 136, no multiple of 64"
    assert_near(fused, model)


def test_projections_in_floats_leave_the_layer_alone():
    model = quantized(config=LiquidConfig(skip=("layers.0.self_attn.k_proj",)))
    expected = logits(model)
    report = fuse_(model)
    assert report.fused == ("model.layers.1",)
    assert report.left == {
        "model.layers.0": "self_attn.k_proj: expected a LiquidLinear, got a Linear"
    }
    assert type(layers(model)[0]).__name__ == "LlamaDecoderLayer"
    assert expected.shape == logits(model).shape


def test_a_down_projection_in_floats_gets_floats():
    model = quantized(config=LiquidConfig(skip=("down_proj",)))
    fused = copy.deepcopy(model)
    assert len(fuse_(fused).fused) == 2
    assert_near(fused, model)


class Doubled(nn.Module):
    """A norm that looks like one, and is another."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return nn.functional.rms_norm(x, (128,), self.weight * 2, self.variance_epsilon)


def double(layer, name):
    """A module of the same class gives twice as much: what trials of its parts do not see."""
    module = getattr(layer, name)
    kind = type(module)
    first = kind.forward

    def forward(self, *args, **kwargs):
        result = first(self, *args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def reads_hidden_states(layer):
    kind = type(layer.self_attn)

    def forward(self, hidden_states, *args, **kwargs):
        y, weights = kind.forward(self, hidden_states, *args, **kwargs)
        return y + hidden_states.mean(), weights

    layer.self_attn.__class__ = type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer: setattr(layer, "input_layernorm", Doubled(layer.input_layernorm)),
            "input_layernorm: a Doubled that computes none of the known norms",
        ),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()), "mlp: its activation, GELU"),
        (lambda layer: setattr(layer, "forward", layer.forward), "it has a forward of its own"),
        (lambda layer: double(layer, "mlp"), "fused, it is off by"),
        (reads_hidden_states, "fused, it does not run: AttributeError"),
        (
            lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
            "mlp: it has hooks, which would not be called",
        ),
        (
            lambda layer: layer.self_attn.v_proj.register_forward_hook(lambda *_: None),
            "self_attn.v_proj: it has hooks",
        ),
        (
            lambda layer: layer.add_module("adapter", nn.Linear(4, 4)),
            "adapter: a Linear, of which there is no rule",
        ),
        (
            lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(128)),
            "input_layernorm: RuntimeError",
        ),
    ],
)
def test_what_does_not_compute_the_same_is_left_alone(llama, change, reason):
    model = copy.deepcopy(llama[0])
    change(layers(model)[1])
    kind = type(layers(model)[1])
    keys = list(model.state_dict())
    report = fuse_(model)
    assert report.fused == ("model.layers.0",)
    assert reason in report.left["model.layers.1"]
    assert reason in str(report)
    assert type(layers(model)[1]) is kind
    assert list(model.state_dict()) == keys
    assert type(layers(model)[1].self_attn.q_proj) is LiquidLinear


def test_doubled_attention_is_taken(llama):
    """Attention is called as it is, whatever it does."""
    model = copy.deepcopy(llama[0])
    double(layers(model)[1], "self_attn")
    fused = copy.deepcopy(model)
    assert len(fuse_(fused).fused) == 2
    assert_near(fused, model)


def test_models_that_cannot_be_tried_are_left_alone(llama):
    model = copy.deepcopy(llama[0]).to("meta")
    assert "on the meta device" in fuse_(model).left["model.layers.0"]
    model = copy.deepcopy(llama[0])
    report = fuse_(model, torch.full((1, 4), 64))
    assert "the model does not run on the first of the calibration data" in str(report)


def test_models_without_decoder_layers_are_refused():
    with pytest.raises(ValueError, match="model: expected one with decoder layers"):
        fuse_(nn.Sequential(LiquidLinear(64, 64)))


def test_biases_and_modes_of_training_stay():
    model = quantized("Qwen2")
    for name in ("q_proj", "k_proj", "v_proj"):
        assert layers(model)[0].self_attn.get_submodule(name).bias is not None
    model.train()
    layers(model)[0].eval()
    before = [module.training for module in unfuse_(copy.deepcopy(model)).modules()]
    fuse_(model)
    assert [module.training for module in unfuse_(model).modules()] == before
