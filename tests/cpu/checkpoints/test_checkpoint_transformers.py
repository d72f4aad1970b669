"""save_quantized and load_quantized on models of transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from plain_models import TOKENS, assert_same_state, edit_manifest, snapshot

import liquidgemm
from liquidgemm import load_quantized, quantize_, save_quantized


def make_llama(dtype=torch.float32, seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.max_new_tokens = 7
    return model


FRESH = """
import sys, torch, liquidgemm
model = liquidgemm.load_quantized(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(12).view(2, 6)).logits
assert torch.equal(logits, torch.load(sys.argv[2])), "other logits"
print("same")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_round_trip(tmp_path, dtype):
    """CHECKLIST 19: rebuilt from the folder alone, here and in a fresh process, with equal bits."""
    model = make_llama(dtype)
    report = quantize_(model, progress=False)
    assert len(report.quantized) == 14
    assert report.skipped["lm_head"] == "matches the pattern 'lm_head'"
    # How the float weights had been stored is not how these are.
    model.config.quantization_config = {"quant_method": "gguf"}
    save_quantized(model, tmp_path / "model")
    stored = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "liquidgemm"
    other = load_quantized(tmp_path / "model")
    assert type(other) is type(model)
    assert not other.training
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.generation_config.max_new_tokens == 7
    assert_same_state(other, snapshot(model))
    with torch.no_grad():
        logits = model(TOKENS).logits
        reference.assert_same(other(TOKENS).logits, logits)
        prompt = TOKENS[:1]
        reference.assert_same(
            other.generate(prompt, do_sample=False), model.generate(prompt, do_sample=False)
        )
    torch.save(logits, tmp_path / "logits.pt")
    result = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "model", tmp_path / "logits.pt"],
        cwd=Path(liquidgemm.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "same", result.stdout + result.stderr


def test_a_model_that_nothing_else_holds_is_saved(tmp_path):
    """save_pretrained has to keep it alive for as long as it runs."""

    def quantized():
        model = make_llama()
        quantize_(model, progress=False)
        return model

    quantized().save_pretrained(tmp_path)
    assert_same_state(load_quantized(tmp_path), snapshot(quantized()))


def test_loading_into_a_transformers_instance(tmp_path):
    expected = make_llama()
    quantize_(expected, progress=False)
    save_quantized(expected, tmp_path)
    other = load_quantized(tmp_path, model=make_llama(seed=1))
    assert_same_state(other, snapshot(expected))


@pytest.mark.parametrize("name", ["NoSuchModel", "AutoConfig", "logging"])
def test_an_unknown_transformers_class_is_refused(tmp_path, name):
    model = make_llama()
    quantize_(model, progress=False)
    save_quantized(model, tmp_path)
    edit_manifest(transformers_class=name)(tmp_path)
    with pytest.raises(ValueError, match=f"no model {name}: pass an instance"):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, FileNotFoundError),
        ("", ValueError),
        ("{", ValueError),
        ("[]", ValueError),
        ('{"model_type": "llama", "hidden_size": "many"}', ValueError),
        ('{"model_type": "llama", "hidden_act": "none"}', ValueError),
    ],
)
def test_a_damaged_transformers_config_is_refused(tmp_path, text, error):
    """CHECKLIST 19."""
    model = make_llama()
    quantize_(model, progress=False)
    save_quantized(model, tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=r"config\.json: "):
        load_quantized(tmp_path)
