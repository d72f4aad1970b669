"""`LiquidLinear.weight`: metadata for those who read it, an error for those who compute with it."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from reference import assert_same
from torch import nn

import liquidgemm
from liquidgemm import LiquidLinear, quantize_

REFUSED = "weight of a LiquidLinear holds no float values: use layer.dequantize()"


def make(in_features=100, out_features=40, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return LiquidLinear.from_linear(nn.Linear(in_features, out_features, bias, dtype=dtype))


def test_metadata():
    weight = make().weight
    assert not isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert weight.shape == weight.size() == (40, 100)
    assert (weight.size(0), weight.size(-1), len(weight)) == (40, 100, 40)
    assert weight.ndim == weight.dim() == 2
    assert weight.numel() == weight.nelement() == 4000
    assert weight.device == torch.device("cpu")
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert (weight.grad, weight.is_cuda, weight.is_meta) == (None, False, False)
    assert repr(weight) == "WeightStandIn(shape=[40, 100], dtype=torch.float32, device='cpu')"
    assert LiquidLinear(100, 40, device="meta").weight.is_meta


@pytest.mark.parametrize("bias", [True, False])
def test_dtype_is_that_of_the_model(bias):
    """What T5 and others cast activations to: that of the float layer, then of every cast."""
    layer = make(bias=bias, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert nn.Sequential(layer).to(dtype)[0].weight.dtype == dtype
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("meta")):
        assert other.weight.dtype == torch.bfloat16
    layer = LiquidLinear(100, 40, bias, device="meta", dtype=torch.float16)
    assert layer.to_empty(device="cpu").weight.dtype == torch.float16


def test_dtype_of_a_loaded_model(tmp_path):
    """Layers without a bias remember what checkpoints do not say."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    quantize_(model, progress=False)
    liquidgemm.save_quantized(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for loaded in (
        liquidgemm.load_quantized(tmp_path / "a"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16),
    ):
        assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "compute",
    [
        lambda w, x: nn.functional.linear(x, w),
        lambda w, x: x @ w,
        lambda w, x: w @ x,
        lambda w, x: w + 1,
        lambda w, x: 2 * w,
        lambda w, x: x + w,
        lambda w, x: torch.matmul(x, w),
        lambda w, x: torch.cat((w, w)),
        lambda w, x: w[0],
        lambda w, x: list(w),
        lambda w, x: nn.init.normal_(w),
        lambda w, x: w.t(),
        lambda w, x: w.T,
        lambda w, x: w.data,
        lambda w, x: w.float(),
        lambda w, x: w.to(torch.float16),
        lambda w, x: w.detach().clone(),
        lambda w, x: nn.init.zeros_(w),
        lambda w, x: w.zero_(),
    ],
)
def test_its_values_are_refused(compute):
    with pytest.raises((TypeError, AttributeError), match=REFUSED):
        compute(make().weight, torch.randn(40, 100))


def assign_in_place(layer):
    layer.weight += 1


def set_item(layer):
    layer.weight[0] = 1


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 100))),
        lambda layer: setattr(layer, "weight", torch.randn(40, 100)),
        lambda layer: setattr(layer, "weight", None),
        lambda layer: delattr(layer, "weight"),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.randn(40, 100))),
        lambda layer: layer.register_buffer("weight", torch.randn(40, 100)),
        lambda layer: setattr(layer.weight, "data", torch.randn(40, 100)),
        lambda layer: setattr(layer.weight, "requires_grad", True),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.weight.data.copy_(torch.randn(40, 100)),
        lambda layer: layer.weight.copy_(torch.randn(40, 100)),
        assign_in_place,
        set_item,
    ],
)
def test_writing_is_refused(write):
    layer = make()
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises((TypeError, AttributeError), match=REFUSED):
        write(layer)
    assert layer.state_dict().keys() == state.keys()
    for key, value in state.items():
        assert_same(layer.state_dict()[key], value)
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False


def test_it_is_in_no_list_of_tensors():
    layer = make()
    assert hasattr(layer, "weight")
    assert not list(layer.parameters())
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_buffers())


def test_a_compiled_model_reads_it():
    """CHECKLIST 18: no graph break."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x):
            weight = self.layer.weight
            if isinstance(weight, torch.Tensor) or weight.dtype == torch.int8:
                return x
            return self.layer(x.to(weight.device, weight.dtype)) * weight.size(0) + weight.numel()

    model, x = Reads(), torch.randn(3, 100, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), model(x))
    for strict in (True, False):
        assert_same(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_of_torch(norm_first):
    """Its fast path, in eval mode and without gradients, looks at linear1.weight."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = model(x)
        quantize_(model, progress=False)
        after = model(x)
    assert (after - before).norm() < 0.2 * before.norm()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100,
        decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.arange(3, 11)[None]
    model = transformers.T5ForConditionalGeneration(config).eval()
    return model, {"input_ids": ids, "decoder_input_ids": ids}


def test_t5_runs():
    """Its feed-forward layers cast what they get to the dtype of wo.weight, if that is a tensor."""
    model, inputs = t5()
    with torch.no_grad():
        before = model(**inputs)[0]
        quantize_(model, progress=False)
        after = model(**inputs)[0]
        assert (after - before).norm() < 0.4 * before.norm()
        # Initialization again, as loading does it, finds nothing to draw in a quantized layer.
        model.apply(model._init_weights)
    assert model.bfloat16()(**inputs)[0].dtype == torch.bfloat16


def test_t5_runs_with_adapters():
    """PEFT's layers have a ``weight`` too, which by itself looks at ``qweight`` first."""
    model, inputs = t5()
    quantize_(model, progress=False)
    with torch.no_grad():
        expected = model(**inputs)[0]
        config = peft.LoraConfig(r=4, target_modules=["wi", "wo"])
        adapted = peft.get_peft_model(model, config)  # zero until it is trained
        assert not isinstance(
            adapted.base_model.encoder.block[0].layer[1].DenseReluDense.wo.weight, torch.Tensor
        )
        assert_same(adapted(**inputs)[0], expected)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("bias", [True, False])
def test_adapters_take_the_device_and_a_float_dtype(init, bias):
    model = nn.Sequential(nn.LayerNorm(100), make(bias=bias))
    config = peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=init)
    adapted = peft.get_peft_model(model, config)
    lora = adapted.base_model.model[1]
    assert lora.lora_A["default"].weight.dtype == torch.float32
    assert lora.weight.shape == (40, 100)
    assert adapted(torch.randn(2, 100)).shape == (2, 40)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_made_from_the_weight_are_refused(init):
    layer = make()
    before = layer(torch.ones(1, 100))
    config = peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=init)
    with pytest.raises((TypeError, AttributeError), match=REFUSED):
        peft.get_peft_model(nn.Sequential(nn.LayerNorm(100), layer), config)
    assert_same(layer(torch.ones(1, 100)), before)
