"""GPT-2's Conv1D, a linear layer that holds its weight as [K, N]."""

import copy

import pytest
import reference
import torch
from tiny_models import assert_same_state, batches, error, logits, make, state
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from liquidgemm import (
    LiquidConfig,
    LiquidGemmConfig,
    LiquidLinear,
    load_quantized,
    quantize_,
    save_quantized,
)

LAYERS = [
    f"transformer.h.{block}.{layer}"
    for block in range(2)
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_it_is_quantized_as_a_linear_layer(method):
    model = make("GPT2")
    expected, floats = logits(model), copy.deepcopy(model)
    data = batches() if method == "gptq" else None
    report = quantize_(model, LiquidConfig(method), calibration=data, progress=False)
    assert list(report.quantized) == LAYERS
    assert report.parameters[f"{LAYERS[0]}.weight"].shape == (96, 288)
    assert error(model, expected) < 0.2
    for name in LAYERS:
        layer, conv = model.get_submodule(name), floats.get_submodule(name)
        assert isinstance(layer, LiquidLinear)
        assert (layer.dequantize() - conv.weight.T).norm() < 0.2 * conv.weight.norm(), name
        reference.assert_same(layer.bias, conv.bias.detach())


def test_patterns_filters_and_smoothing_reach_it():
    model = make("GPT2")
    config = LiquidConfig(skip=("h.0.*",), keep=("c_fc",), smooth={"ln_1": ("attn.c_attn",)})
    report = quantize_(
        model,
        config,
        lambda name, layer: type(layer) is Conv1D and "mlp.c_proj" not in name,
        calibration=batches(),
        progress=False,
    )
    assert list(report.quantized) == LAYERS[4:7]
    methods = {layer.name: layer.method for layer in report.layers}
    assert methods[LAYERS[6]] == "int8"
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D


def test_errors_and_dry_runs_leave_it_as_it_was():
    model = make("GPT2")
    modules, parameters = list(model.modules()), list(model.parameters())
    report = quantize_(model, dry_run=True)
    assert "288 x 96" in report.plan[LAYERS[0]]
    with pytest.raises(ValueError, match="calibration: "):
        quantize_(model, LiquidConfig("gptq"))
    assert list(model.modules()) == modules
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    model.transformer.h[1].mlp.c_fc.weight.data[3, 17] = torch.nan
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc: weight: expected finite.*row 17"):
        quantize_(model, progress=False)
    with pytest.raises(ValueError, match="use LiquidLinear"):
        quantize_(Conv1D(64, 64))


@pytest.mark.parametrize("writer", ["save_quantized", "save_pretrained"])
@pytest.mark.parametrize("reader", ["load_quantized", "from_pretrained", "into an instance"])
def test_saved_and_loaded(tmp_path, writer, reader):
    model = make("GPT2")
    quantize_(model, LiquidConfig(keep=("0.mlp.c_fc",)), progress=False)
    if writer == "save_quantized":
        save_quantized(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    if reader == "from_pretrained":
        other = AutoModelForCausalLM.from_pretrained(tmp_path)
    elif reader == "load_quantized" or writer == "save_pretrained":
        other = load_quantized(tmp_path)
    else:
        other = load_quantized(tmp_path, model=make("GPT2", seed=1))
    assert_same_state(other, state(model))
    reference.assert_same(logits(other), logits(model))


def test_quantized_as_it_is_loaded(tmp_path):
    make("GPT2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LiquidGemmConfig())
    assert [n for n, m in model.named_modules() if isinstance(m, LiquidLinear)] == LAYERS


def test_subclasses_are_left_alone():
    class Own(Conv1D):
        pass

    model = nn.Sequential(Conv1D(64, 64), Own(64, 64))
    report = quantize_(model, progress=False)
    assert report.quantized == ("0",)
    assert report.skipped == {"1": "not nn.Linear but Own"}
