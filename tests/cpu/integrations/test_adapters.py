"""LoRA of PEFT on quantized layers, and torchao's quantize_, through their own interfaces."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import reference
import torch
from tiny_llama import IDS, LINEAR_LAYERS, float_model, liquid_layers, quantized
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, quantize_

# PEFT.


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def lora(peft, model: nn.Module, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def test_lora_trains_and_leaves_the_base_alone(tmp_path, peft):
    model = quantized(float_model(tmp_path / "float", torch.float32))
    layers = {name: model.get_submodule(name) for name in liquid_layers(model)}
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = lora(peft, model)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            reference.assert_same(tensor, before[name][key], key=f"{name}.{key}")

    adapted.save_pretrained(tmp_path / "adapter")
    adapted.eval()
    other = peft.PeftModel.from_pretrained(quantized(tmp_path / "float"), tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(IDS).logits
        reference.assert_same(other.eval()(IDS).logits, expected)
        with adapted.disable_adapter():
            assert not torch.equal(adapted(IDS).logits, expected)
    pickle.loads(pickle.dumps(adapted))


def test_what_lora_cannot_do_says_so(tmp_path, peft):
    float_model(tmp_path)
    adapted = lora(peft, quantized(tmp_path))
    with pytest.raises(NotImplementedError, match="cannot be merged into 4-bit weights"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="use_dora: expected False"):
        lora(peft, quantized(tmp_path), use_dora=True)


def test_lora_on_a_plain_layer_is_as_ever(peft):
    model = nn.Sequential(nn.Linear(8, 8))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert type(adapted.base_model.model[0]).__module__ == "peft.tuners.lora.layer"
    assert isinstance(adapted.merge_and_unload()[0], nn.Linear)


# torchao.


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def test_torchao_dispatches_to_us(torchao):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 10, bias=False)).eval()
    expected = copy.deepcopy(model)
    quantize_(expected, LiquidConfig("rtn", 128), progress=False)
    torchao.quantize_(model, LiquidConfig("rtn", 128))
    x = torch.randn(3, 192)
    assert [type(layer) for layer in model] == [LiquidLinear, nn.ReLU, LiquidLinear]
    assert not model[0].training
    reference.assert_same(model(x), expected(x))


def test_torchao_filters(torchao):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torchao.quantize_(model, LiquidConfig(), filter_fn=lambda module, name: name == "1")
    assert [type(layer) for layer in model] == [nn.Linear, LiquidLinear]


def test_torchao_refuses_what_needs_more_than_a_layer(torchao):
    model = nn.Sequential(nn.Linear(64, 64))
    for config in (LiquidConfig("gptq"), LiquidConfig(keep=("0",)), LiquidConfig(rotate=True)):
        with pytest.raises(ValueError, match=r"config: expected a method .* liquidgemm\.quantize_"):
            torchao.quantize_(model, config)
    assert type(model[0]) is nn.Linear


def test_torchao_with_nothing_to_quantize_warns(torchao):
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    with pytest.warns(UserWarning, match="not one layer was quantized"):
        torchao.quantize_(model, LiquidConfig())
    with pytest.warns(UserWarning, match="not one layer was quantized"):
        torchao.quantize_(nn.Sequential(nn.Linear(64, 64)), LiquidConfig(), lambda *_: False)


@pytest.mark.parametrize("first", ["torchao", "liquidgemm"])
def test_torchao_warns_whichever_is_imported_first(torchao, first):
    code = f"""
import {first}, warnings, torch, liquidgemm
from torchao.quantization import quantize_
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    quantize_(torch.nn.Sequential(), liquidgemm.LiquidConfig())
assert any("not one layer" in str(w.message) for w in caught), caught
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
