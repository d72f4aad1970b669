"""What quantize_ asks of its arguments, its plan and its report."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import assert_same_state, batches, make, state
from torch import nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration.blocks import find_stages
from liquidgemm.quantization.calibration.data import as_batches, token_windows
from liquidgemm.quantization.calibration.flow import Recordings
from liquidgemm.quantization.calibration.units import find_units


def fake_tokenizer(text):
    return {"input_ids": [ord(letter) % 64 for letter in text]}


def test_texts_and_windows():
    windows = token_windows(["abc" * 5, "xyz" * 6], fake_tokenizer, length=10)
    assert [w.shape for w in windows] == [(1, 10)] * 3
    assert torch.cat(windows, 1)[0].tolist() == [ord(c) % 64 for c in "abc" * 5 + "xyz" * 5]
    few = token_windows(["abc" * 100], fake_tokenizer, length=10, limit=35)
    assert len(few) == 3
    assert [w.shape for w in token_windows(["ab"], fake_tokenizer, length=10)] == [(1, 2)]
    assert len(as_batches(["abc", batches(1)[0]], fake_tokenizer)) == 2


def test_windows_of_text_are_no_longer_than_a_model_takes():
    """BERT has 512 positions; of RoBERTa's 514 its tokenizer knows that it may use 512."""
    short = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=32))
    (first, *_) = as_batches(["a" * 100], fake_tokenizer, "calibration", short)
    assert first.shape == (1, 32)

    class Shorter:
        model_max_length = 30

        def __call__(self, text):
            return fake_tokenizer(text)

    (first, *_) = as_batches(["a" * 100], Shorter(), "calibration", short)
    assert first.shape == (1, 30)
    (first, *_) = as_batches(["a" * 3000], fake_tokenizer, "calibration")
    assert first.shape == (1, 1024)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({"method": "gptq"}, {}, ValueError, "calibration: expected .* for method 'gptq', got N"),
        ({"smooth": True}, {}, ValueError, "calibration: expected .* for smooth, got None"),
        ({}, {"calibration": []}, ValueError, "calibration: expected at least one"),
        ({}, {"calibration": "text"}, TypeError, "calibration: .* got one str: put it in a list"),
        ({}, {"calibration": batches(1)[0]}, TypeError, "calibration: .* got one Tensor"),
        ({}, {"calibration": ["text"]}, ValueError, "tokenizer: .* calibration holds texts"),
        ({}, {"calibration": [3]}, TypeError, "calibration: .* got int"),
        ({}, {"calibration": batches(), "held_out": [3]}, TypeError, "held_out: .* got int"),
    ],
)  # fmt: skip
def test_arguments_are_checked(config, options, error, message):
    """CHECKLIST 7."""
    model = make()
    before = state(model)
    with pytest.raises(error, match=message):
        quantize_(model, LiquidConfig(**config), progress=False, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": 63}, "augment: expected a multiple of 64"),
        ({"augment": {"x": -64}}, "augment: "),
        ({"smooth": "norm"}, "smooth: expected True, False or names"),
        ({"smooth": {"norm": "q"}}, r"smooth\['norm'\]: expected a sequence"),
        ({"keep": "q"}, "keep: expected a sequence"),
        ({"rotate": 1}, "rotate: expected True or False"),
        ({"damping": -1}, "damping: "),
        ({"shrinkage": 2}, "shrinkage: "),
        ({"tune": -1}, "tune: expected an integer >= 0"),
        ({"seed": 0.5}, "seed: "),
        ({"gate": "shut"}, "gate: expected one of"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LiquidConfig(**fields)


def test_config_json_round_trip():
    config = LiquidConfig(
        "gptq",
        128,
        ("a",),
        ("b",),
        {"x": 64},
        {"n": ["q", "k"]},
        True,
        True,
        0.5,
        0.25,
        9,
        7,
        "warn",
    )
    assert LiquidConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("argument", ["held_out", "resume"])
def test_arguments_that_need_calibration(argument, tmp_path):
    model = make()
    before = state(model)
    value = tmp_path / "blocks" if argument == "resume" else batches(1)
    with pytest.raises(ValueError, match=f"calibration: expected data, as {argument} is given"):
        quantize_(model, progress=False, **{argument: value})
    assert_same_state(model, before)
    assert not list(tmp_path.iterdir())


def test_devices_and_folders_that_are_not_there(tmp_path):
    config, file = LiquidConfig("hessian"), tmp_path / "file"
    file.touch()
    for options in ({"device": "foo"}, {"device": "cuda:99"}, {"resume": file}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected "):
            quantize_(make(), config, progress=False, calibration=batches(1), **options)


def test_dry_run_changes_nothing():
    model = make()
    before = state(model)
    config = LiquidConfig("gptq", smooth=True, augment=64, keep=("down_proj",))
    report = quantize_(model, config, dry_run=True)
    assert_same_state(model, before)
    text = str(report)
    assert "model.layers.0.self_attn.q_proj  96 x 96, gptq, 64 residual columns" in text
    assert "model.layers.1.mlp.down_proj     96 x 136, int8" in text
    assert report.plan["model.layers.1.mlp.up_proj"].endswith("by post_attention_layernorm")
    assert "lm_head: matches the pattern 'lm_head'" in text


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    report = quantize_(make(), LiquidConfig("gptq"), calibration=batches(), progress=False)
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(worst=3).row_count == 3
    assert "no held-out text" in str(report)
    first = json.loads(report.to_json())["layers"][0]
    assert first["method"] == "gptq"
    assert 0 < first["output_error"] < 1


def test_stages_share_their_input():
    model = make()
    block = model.model.layers[0]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    units = find_units(model, [f"model.layers.0.{name}" for name in layers])
    call = Recordings(model, units).flows(batches(1), "calibration")[0].call()
    stages, repeated = find_stages(block, layers, call)
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert not repeated
