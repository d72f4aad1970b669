"""What `LiquidLinear.from_linear` takes for a linear layer, and the dtypes that a layer has."""

import pytest
import reference
import torch
from torch import nn

from liquidgemm import LiquidLinear, load_quantized, quantize_, save_quantized


def error_of(layer: nn.Module, original: nn.Module, k: int = 64) -> float:
    x = torch.randn(5, k)
    exact = original(x)
    return ((layer(x) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(64, 64), (64, 128)])
def test_a_transposed_weight_is_no_other_layer(shape):
    """Of GPT-2's Conv1D ``[K, N]``; a square one gives no error of sizes."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(shape[1], shape[0])
    nn.init.normal_(conv.weight)
    layer = LiquidLinear.from_linear(conv)
    assert (layer.in_features, layer.out_features) == shape
    assert layer.replaces is pytorch_utils.Conv1D
    assert error_of(layer, conv) < 0.15


def test_a_weight_that_is_computed_is_a_weight():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(64, 32))
    assert error_of(LiquidLinear.from_linear(linear), linear) < 0.15


def adapter() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        adapter,
        lambda: Doubled(64, 64),
        lambda: nn.Embedding(64, 64),
        lambda: None,
        lambda: nn.Conv1d(64, 64, 1),
        lambda: LiquidLinear(64, 64),
    ],
    ids=["adapter", "subclass", "Embedding", "None", "Conv1d of torch", "LiquidLinear"],
)
def test_what_computes_something_else_is_refused(make):
    """Its weight alone would be another function."""
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear or a Conv1D, got"):
        LiquidLinear.from_linear(make())


def test_a_weight_without_data_is_refused():
    with pytest.raises(ValueError, match="weight: expected one with data, got one on the meta"):
        LiquidLinear.from_linear(nn.Linear(64, 64, device="meta"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_a_dtype_that_no_output_can_have(dtype, bias):
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got torch"):
        LiquidLinear(64, 64, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_loading_into_layers_of_another_dtype_leaves_the_model_as_it_was(tmp_path, bias):
    """The first layer fits."""

    def make(dtype):
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias, dtype=dtype))

    model = make(torch.float32)
    quantize_(model, progress=False)
    save_quantized(model, tmp_path)
    other = make(torch.float64)
    before = [value.clone() for value in other.parameters()]
    with pytest.raises(ValueError, match="1: expected a layer of float32, bfloat16 or float16 in"):
        load_quantized(tmp_path, other)
    assert [type(module) for module in other] == [nn.Linear, nn.Linear]
    for value, old in zip(other.parameters(), before, strict=True):
        reference.assert_same(value.detach(), old)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_tells_the_dtype_of_its_model_before_and_after_loading(tmp_path, bias):
    """A model may ask for it while it is loaded, and where it is loaded without data."""
    transformers = pytest.importorskip("transformers")
    import tiny_llama

    tiny_llama.float_model(tmp_path / "float")
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "float", attention_bias=bias)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "out")
    for options in ({}, {"device_map": {"": "meta"}}):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
        layers = [m for m in loaded.modules() if isinstance(m, LiquidLinear)]
        assert len(layers) == 14
        assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
