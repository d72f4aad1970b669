"""From quantized layers back to float ones."""

import json

import pytest
import reference
import torch
from structures import IDS, structures
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from liquidgemm import LiquidLinear, dequantize_, quantize_
from liquidgemm.integrations import transformers as integration


def quantized(name):
    model = structures()[name].make()
    quantize_(model, progress=False)
    return model


def test_plain_modules():
    model = nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Linear(48, 8, bias=False)})
    model["c"] = model["a"]
    model.to(torch.bfloat16).eval()
    quantize_(model, progress=False)
    expected = {name: (model[name].dequantize(torch.bfloat16), model[name].bias) for name in "ab"}
    assert dequantize_(model) is model
    for name, (weight, bias) in expected.items():
        assert type(model[name]) is nn.Linear
        assert not model[name].training
        reference.assert_same(model[name].weight.detach(), weight)
        if bias is not None:
            reference.assert_same(model[name].bias.detach(), bias)
    assert model["c"] is model["a"]
    assert not hasattr(model, "liquid_config")
    assert len(quantize_(model, progress=False).quantized) == 2
    assert dequantize_(model, torch.float16)["b"].weight.dtype == torch.float16


def test_without_quantized_layers():
    for model in (nn.Sequential(nn.Linear(4, 4)), LiquidLinear(64, 64)):
        with pytest.raises(ValueError, match="expected a module that contains quantized layers"):
            dequantize_(model)


@pytest.mark.parametrize("name", ["GPT-2", "T5", "GPT-Neo"])
@pytest.mark.parametrize("loaded", [False, True])
def test_where_transformers_expects_it(tmp_path, name, loaded):
    """A model that save_pretrained writes as a float one, with weights the right way round."""
    model = quantized(name)
    kind = type(model)
    if loaded:
        model.save_pretrained(tmp_path / "quantized")
        model = kind.from_pretrained(tmp_path / "quantized")
    inputs = structures()[name].inputs
    with torch.no_grad():
        before = model(**inputs).logits
    assert model.dequantize() is model
    assert not any(isinstance(module, LiquidLinear) for module in model.modules())
    assert any(type(module) is Conv1D for module in model.modules()) is (name == "GPT-2")
    with torch.no_grad():
        after = model(**inputs).logits
    # Activations are no longer rounded, that is all.
    assert 0 < torch.dist(after, before) < 0.1 * before.norm()
    assert getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    other = kind.from_pretrained(tmp_path / "float")
    with torch.no_grad():
        reference.assert_same(other(**inputs).logits, after)


def test_a_model_without_quantized_layers_is_not_labelled(tmp_path):
    """Layers that were replaced by hand: the label follows the layers."""
    model = quantized("GPT-Neo")
    for name, module in list(model.named_modules()):
        if isinstance(module, LiquidLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            model.set_submodule(name, linear)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path)(IDS)
    integration.attach(model, None)
    assert getattr(model, "hf_quantizer", None) is None


def test_a_model_inside_a_module_is_labelled(tmp_path):
    model = structures()["GPT-Neo"].make()
    quantize_(nn.ModuleDict({"inner": model}), progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(config["layers"]) == 12
    with torch.no_grad():
        expected = model(IDS).logits
        reference.assert_same(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_adapters_become_those_of_peft_again():
    peft = pytest.importorskip("peft")
    model = structures()["GPT-Neo"].make()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    quantize_(model, progress=False)
    dequantize_(model)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
