"""The head="int8" of a config: output embeddings with 8-bit weights, tied or not."""

import copy

import pytest
import tiny_models
import torch
import transformers
from reference import assert_same
from torch import nn

from liquidgemm import (
    LiquidConfig,
    LiquidLinear,
    QuantizedTokens,
    dequantize_,
    load_quantized,
    quantize_,
    quantize_activation,
    save_quantized,
)
from liquidgemm.quantization.calibration.gptq import int8_weight

TOKENS = tiny_models.batches(1, seed=9)[0]
HEAD = LiquidConfig(head="int8")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "apart"])
def models(request):
    """A float model, and the same with its head quantized as well."""
    model = tiny_models.make(vocab_size=192, tie_word_embeddings=request.param)
    quantized = copy.deepcopy(model)
    return model, quantized, quantize_(quantized, HEAD, progress=False)


def test_head_is_quantized_to_8_bits(models):
    model, quantized, report = models
    head = quantized.lm_head
    expected = int8_weight(model.lm_head.weight.detach())
    assert isinstance(head, LiquidLinear)
    assert "lm_head" in report.quantized
    assert {layer.name: layer.method for layer in report.layers}["lm_head"] == "int8"
    for name in ("qweight", "qscale", "qoffset", "scale", "columns"):
        assert_same(getattr(head, name), getattr(expected, name))
    # Off by at most half a step, and the factor of every row is its step.
    error = (head.dequantize() - model.lm_head.weight).abs()
    assert (error <= 0.501 * head.scale.unsqueeze(1)).all()


def test_embeddings_keep_their_table(models):
    model, quantized, report = models
    assert_same(quantized.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert quantized.config.tie_word_embeddings is False
    assert quantized.liquid_config == HEAD
    assert not report.parameters["model.embed_tokens.weight"].quantized
    quantized.tie_weights()  # has nothing to tie
    assert isinstance(quantized.lm_head, LiquidLinear)


def test_head_tied_to_embeddings_of_another_class():
    """Gemma's scale what they look up, in a class of their own."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    config = transformers.Gemma3TextConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    model = transformers.Gemma3ForCausalLM(config).eval()
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    expected = int8_weight(table.detach().clone())
    quantize_(model, HEAD, progress=False)
    assert_same(model.lm_head.qweight, expected.qweight)
    assert model.get_input_embeddings().weight is table
    assert model.config.tie_word_embeddings is False


def test_the_rest_is_quantized_as_without(models):
    model, quantized, _ = models
    other = copy.deepcopy(model)
    quantize_(other, progress=False)
    assert type(other.lm_head) is nn.Linear
    state = {k: v for k, v in quantized.state_dict().items() if not k.startswith("lm_head")}
    for key, value in state.items():
        assert_same(other.state_dict()[key], value, key=key)


@pytest.mark.parametrize("writer", ["save_quantized", "save_pretrained"])
@pytest.mark.parametrize("reader", ["load_quantized", "from_pretrained"])
def test_checkpoints(models, tmp_path, writer, reader):
    _, quantized, _ = models
    if writer == "save_quantized":
        save_quantized(quantized, tmp_path)
    else:
        quantized.save_pretrained(tmp_path)
    if reader == "load_quantized":
        loaded = load_quantized(tmp_path)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, LiquidLinear)
    assert loaded.liquid_config == HEAD
    tiny_models.assert_same_state(loaded, tiny_models.state(quantized))
    assert_same(tiny_models.logits(loaded, TOKENS), tiny_models.logits(quantized, TOKENS))


def test_logits_in_float32(models):
    quantized = copy.deepcopy(models[1]).bfloat16()
    rounded = tiny_models.logits(quantized, TOKENS)
    quantized.lm_head.out_dtype = torch.float32
    logits = tiny_models.logits(copy.deepcopy(quantized), TOKENS)
    assert logits.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert_same(logits.bfloat16(), rounded)
    x = torch.randn(3, 96).bfloat16()
    tokens = QuantizedTokens(*quantize_activation(x), x.dtype)
    assert_same(quantized.lm_head(tokens), quantized.lm_head(x))


def test_dequantized_heads_have_a_weight_of_their_own(models):
    quantized = copy.deepcopy(models[1])
    weight = quantized.lm_head.dequantize()
    dequantize_(quantized)
    assert_same(quantized.lm_head.weight.detach(), weight)
    assert quantized.lm_head.weight is not quantized.get_input_embeddings().weight


def test_with_calibration_and_rotation(models):
    model = copy.deepcopy(models[0])
    config = LiquidConfig(method="gptq", smooth=True, rotate=True, head="int8")
    report = quantize_(model, config, calibration=tiny_models.batches(2), progress=False)
    assert {layer.name: layer.method for layer in report.layers}["lm_head"] == "int8"
    assert not report.verification.faults


def test_dry_run_says_so_and_changes_nothing(models):
    model = copy.deepcopy(models[0])
    report = quantize_(model, HEAD, dry_run=True)
    assert "int8, 10.67 bits per weight" in report.plan["lm_head"]
    assert type(model.lm_head) is nn.Linear
    assert model.config.tie_word_embeddings is models[0].config.tie_word_embeddings


def test_the_head_alone(models):
    model = copy.deepcopy(models[0])
    report = quantize_(model, LiquidConfig(head="int8", skip=("layers.*",)), progress=False)
    assert report.quantized == ("lm_head",)


def test_other_models_have_one_by_its_name():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 128)})
    report = quantize_(model, HEAD, progress=False, verify=False)
    assert {layer.name: layer.method for layer in report.layers} == {
        "body": "search",
        "lm_head": "int8",
    }


def test_done_before_is_no_error(models):
    quantized = copy.deepcopy(models[1])
    assert not quantize_(quantized, HEAD, progress=False).quantized


def bert():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, **sizes))


def t5():
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, **sizes))


def hooked():
    model = tiny_models.make(vocab_size=192)
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def read_by_code():
    """By what no source tells: it shows when the model runs."""
    model = tiny_models.make(vocab_size=192)
    head, norm = model.lm_head, model.model.norm

    class Reader(nn.Module):
        def forward(self, x):
            return norm(x) + 0 * getattr(head, "weight").sum()  # noqa: B009

    model.model.norm = Reader()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "head: expected a model with output embeddings or a layer named lm_head"),
        (t5, "got lm_head: its weight is tied to another module's"),
        (hooked, "got lm_head: it has hooks"),
        (read_by_code, "got lm_head: its weight is read by Reader"),
    ],
)
def test_heads_that_cannot_be_are_refused(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        quantize_(model, HEAD, progress=False)
    assert not any(isinstance(module, LiquidLinear) for module in model.modules())


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="head: expected one of"):
        LiquidConfig(head="int4")
