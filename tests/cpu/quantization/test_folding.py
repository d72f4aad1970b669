"""Smoothing and rotation leave the float model's function as it is, and tame outliers."""

import pytest
import torch
from tiny_models import assert_same_state, batches, error, logits, make, state
from torch import nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration.blocks import main_tensor, run_block
from liquidgemm.quantization.calibration.flow import Recordings
from liquidgemm.quantization.calibration.rotate import rotate_
from liquidgemm.quantization.calibration.sites import Trials, find_sites
from liquidgemm.quantization.calibration.units import find_units

NORMS = ["input_layernorm", "post_attention_layernorm"]
LINEARS = ["self_attn.v_proj", "mlp.up_proj"]


def first_call(model, batch):
    """Name of the first block, and the call of it."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    flow = Recordings(model, find_units(model, layers)).flows([batch], "calibration")[0]
    return flow.next, flow.call()


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("Llama", [*NORMS, *LINEARS]),
        ("Qwen2", [*NORMS, *LINEARS]),
        ("Mistral", [*NORMS, *LINEARS]),
        ("Gemma", [*NORMS, *LINEARS]),
        ("Gemma2", ["pre_feedforward_layernorm", "input_layernorm", *LINEARS]),
        ("GPTNeoX", NORMS),
        ("GPT2", []),  # its layers are no nn.Linear
    ],
)
def test_smoothing_pairs(kind, sources):
    """What is found can be folded: `Trials` has tried each with arbitrary factors."""
    model = make(kind)
    name, call = first_call(model, batches(1)[0])
    if not sources:
        assert find_sites(model.transformer.h[0], LiquidConfig(smooth=True)) == []
        return
    block = model.get_submodule(name)
    found = find_sites(block, LiquidConfig(smooth=True))
    before = state(block)
    usable, refused = Trials(block, lambda b: [main_tensor(run_block(b, call))]).usable(found)
    assert [site.source for site in usable] == sources, refused
    assert_same_state(block, before)


def test_a_pair_that_cannot_be_folded_is_found_out():
    """In a block whose norm feeds the residual stream as well."""

    class Block(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.input_layernorm = original.input_layernorm
            self.self_attn = original.self_attn

        def forward(self, hidden_states, **kwargs):
            x = self.input_layernorm(hidden_states)
            return x + self.self_attn(x, **kwargs)[0]

    model = make()
    block = Block(model.model.layers[0])
    _, call = first_call(model, batches(1)[0])
    sites = find_sites(block, LiquidConfig(smooth=True))
    usable, refused = Trials(block, lambda b: [main_tensor(run_block(b, call))]).usable(sites)
    assert [site.source for site in usable] == ["self_attn.v_proj"]
    assert [site.source for site in refused] == ["input_layernorm"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"nowhere": ["mlp.up_proj"]}, "smooth: expected names within a block, got 'nowhere'"),
        ({"input_layernorm": ["mlp"]}, "smooth: mlp: expected an nn.Linear, got LlamaMLP"),
        ({"input_layernorm": ["mlp.up_proj"]}, "smooth: input_layernorm into mlp.up_proj: what"),
        ({"input_layernorm": ["self_attn.q_proj"]}, "smooth: input_layernorm into .* used else"),
        ({"mlp.down_proj": ["mlp.up_proj"]}, "smooth: mlp.down_proj into"),
        ({"mlp.act_fn": ["mlp.down_proj"]}, "smooth: mlp.act_fn: expected a norm .* got SiLU"),
        (
            {"input_layernorm": ["self_attn.q_proj", "mlp.down_proj"]},
            "smooth: expected linears of one input size, got .*: input_layernorm into",
        ),
        (
            {"input_layernorm": ["mlp.down_proj"]},
            "smooth: input_layernorm into mlp.down_proj: expected a source of 136 .* got 96",
        ),
    ],
)
def test_wrong_pairs_are_refused(pairs, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, LiquidConfig(smooth=pairs), calibration=batches(), progress=False)
    assert_same_state(model, before)


def test_named_pairs():
    pairs = {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
    report = quantize_(
        make(), LiquidConfig("gptq", smooth=pairs), calibration=batches(), progress=False
    )
    smoothed = {layer.name.rpartition(".")[2] for layer in report.layers if layer.alpha}
    assert smoothed <= {"gate_proj", "up_proj"}
    assert smoothed


def test_smoothing_tames_outliers():
    """A feature a hundred times as large as the others, as models have them."""
    errors = {}
    for smooth in (False, True):
        model = make()
        for block in model.model.layers:
            block.input_layernorm.weight.data[7] *= 100
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight.data[:, 7] /= 100
        expected = logits(model)
        config = LiquidConfig("hessian", smooth=smooth)
        report = quantize_(model, config, calibration=batches(), progress=False)
        assert max(layer.outlier for layer in report.layers) > (1 if smooth else 30)
        errors[smooth] = error(model, expected)
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_rotation_leaves_the_function(kind, heads):
    model = make(kind)
    expected, before = logits(model), state(model)
    rotate_(model, LiquidConfig(rotate=True, rotate_heads=heads))
    assert error(model, expected) < 1e-4
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    changed = {key for key, value in before.items() if not torch.equal(value, state(model)[key])}
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert ("model.layers.0.self_attn.v_proj.weight" in changed) >= heads


def test_rotation_spreads_outliers():
    model = make()
    model.model.embed_tokens.weight.data[:, 5] *= 50

    def ratio():
        x = first_call(model, batches(1)[0])[1].hidden
        amax = x.abs().flatten(0, 1).amax(0)
        return (amax.max() / amax.median()).item()

    before = ratio()
    rotate_(model, LiquidConfig(rotate=True))
    assert ratio() < 0.2 * before


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "GPTNeoX", "GPT2"])
def test_rotation_of_other_models_is_refused(kind):
    model = make(kind)
    before = state(model)
    with pytest.raises(ValueError, match="rotate: expected a model of the Llama family, got one"):
        quantize_(model, LiquidConfig(rotate=True), progress=False)
    assert_same_state(model, before)
