"""quantize_ with calibration data: whole models, the gate, resuming."""

import json

import pytest
import reference
import torch
from tiny_models import assert_same_state, batches, error, logits, make, state, transformers
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, load_quantized, quantize_, save_quantized
from liquidgemm.quantization.calibration import driver
from liquidgemm.quantization.calibration.simulate import SimulatedLinear
from liquidgemm.quantization.layer import quantize_layer

RECIPES = {
    "hessian": {"method": "hessian"},
    "gptq": {"method": "gptq"},
    "smooth": {"smooth": True},
    "tune": {"method": "gptq", "tune": 20},
    "all": {
        "method": "gptq",
        "tune": 5,
        "smooth": True,
        "rotate": True,
        "rotate_heads": True,
        "augment": 64,
        "keep": ("down_proj",),
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_save_and_load(recipe, tmp_path):
    """Every recipe gives a model near the float one, that is stored and restored to the bit."""
    model = make()
    expected = logits(model)
    config = LiquidConfig(**RECIPES[recipe], gate="off")
    report = quantize_(model, config, calibration=batches(), progress=False)
    assert len(report.quantized) == len(report.layers) == 14
    assert {layer.name for layer in report.layers} == set(report.quantized)
    assert all(layer.tokens == 4 * 2 * 24 and layer.output_error < 0.1 for layer in report.layers)
    assert error(model, expected) < 0.25
    assert model.liquid_config == config
    save_quantized(model, tmp_path)
    other = load_quantized(tmp_path)
    assert_same_state(other, state(model))
    reference.assert_same(logits(other), logits(model))
    version = json.loads((tmp_path / "liquidgemm.json").read_text())["format_version"]
    assert version == (2 if recipe == "all" else 1)
    assert "method" in json.loads(report.to_json())["layers"][0]


def test_the_simulation_is_the_real_path():
    layer = LiquidLinear.from_quantized(
        quantize_layer(torch.randn(48, 100), LiquidConfig(augment=64))[0], torch.randn(48)
    )
    simulated = SimulatedLinear(layer.quantized_weight(), layer.bias)
    x = torch.randn(5, 100, requires_grad=True)
    expected = layer(x)
    torch.testing.assert_close(simulated(x), expected)  # but for the order of float32 sums
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, grad)[0] for y in (simulated(x), expected))
    )
    with torch.no_grad():
        torch.testing.assert_close(simulated(x), expected)
        simulated.divide_outputs(torch.full((48,), 2.0))
        torch.testing.assert_close(simulated(x), expected / 2)


def test_the_default_device_does_not_matter():
    expected, model = make(), make()
    config, data = LiquidConfig(**RECIPES["all"], gate="off"), batches()
    quantize_(expected, config, calibration=data, progress=False)
    with torch.device("meta"):
        quantize_(model, config, calibration=data, progress=False)
    assert_same_state(model, state(expected))


def test_int8_everywhere_is_close():
    model = make()
    expected = logits(model)
    quantize_(model, LiquidConfig(keep=("*",)), progress=False)
    assert error(model, expected) < 0.05


def test_calibration_is_deterministic():
    first, second = make(), make()
    config = LiquidConfig("gptq", smooth=True, rotate=True, gate="off")
    for model in (first, second):
        quantize_(model, config, calibration=batches(), progress=False)
    assert_same_state(second, state(first))


def test_later_blocks_see_what_quantized_blocks_give(monkeypatch):
    """Moments of a layer in the second block come from the quantized first block."""
    model = make()
    seen = {}
    original = driver.quantize_layers

    def spy(weights, config, moments):
        seen.update(dict.fromkeys(weights, moments))
        return original(weights, config, moments)

    monkeypatch.setattr(driver, "quantize_layers", spy)
    quantize_(model, LiquidConfig("hessian"), calibration=batches(), progress=False)
    q, k = (seen[f"model.layers.1.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert q is k
    inputs = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1))
    )
    for batch in batches():
        logits(model, batch)
    hook.remove()
    x = driver.round_activation(torch.cat(inputs)).double()
    expected = x.T @ x / len(x)
    assert (q.hessian.double() - expected).norm() < 1e-2 * expected.norm()


def test_tuning_brings_blocks_closer_to_the_float_model():
    """On text that it has not seen, of the kind that it has."""
    errors = {}
    for tune in (0, 50):
        model = make()
        expected = logits(model)
        config = LiquidConfig("gptq", tune=tune)
        quantize_(model, config, calibration=batches(24), progress=False)
        errors[tune] = error(model, expected)
    assert errors[50] < 0.97 * errors[0], errors


def test_a_model_without_blocks_is_one_block():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96), nn.Linear(96, 64))
    x = [torch.randn(50, 96) for _ in range(4)]
    expected = net(x[0])
    report = quantize_(net, LiquidConfig("gptq"), calibration=x, progress=False)
    assert report.quantized == ("0", "2", "3")
    assert all(layer.tokens == 200 and layer.method == "gptq" for layer in report.layers)
    assert (net(x[0]) - expected).norm() < 0.15 * expected.norm()


def test_a_layer_that_is_never_called_is_searched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    report = quantize_(
        Net(), LiquidConfig("gptq"), calibration=[torch.randn(29, 64)], progress=False
    )
    assert {layer.name: (layer.method, layer.tokens) for layer in report.layers} == {
        "used": ("gptq", 29),
        "unused": ("search", 0),
    }


def test_padding_is_left_out():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.BertModel(config).eval()
    short = {"input_ids": torch.arange(10).view(1, 10), "attention_mask": torch.ones(1, 10).long()}
    padded = {
        "input_ids": torch.cat((short["input_ids"], torch.full((1, 6), 63)), 1),
        "attention_mask": torch.cat((short["attention_mask"], torch.zeros(1, 6).long()), 1),
    }
    report = quantize_(model, LiquidConfig("hessian"), calibration=[short, padded], progress=False)
    inside = [layer for layer in report.layers if "encoder" in layer.name]
    assert len(inside) == 12
    assert {layer.tokens for layer in inside} == {20}


# The gate.


@pytest.mark.parametrize("gate", ["raise", "warn", "off"])
def test_gate(gate, monkeypatch):
    """A calibrated model that does worse on unseen text is refused and the float model is left."""
    model = make()
    before = state(model)

    def broken(weights, config, moments):
        for quantized, method in original(weights, config, moments):
            quantized.scale.mul_(3)
            yield quantized, method

    original = driver.quantize_layers
    monkeypatch.setattr(driver, "quantize_layers", broken)

    def run():
        return quantize_(
            model,
            LiquidConfig("gptq", gate=gate),
            calibration=batches(),
            held_out=tokens_of(make()),
            progress=False,
        )

    if gate == "raise":
        with pytest.raises(RuntimeError, match="gate: on held-out text the calibrated model has"):
            run()
        assert_same_state(model, before)
        return
    if gate == "warn":
        with pytest.warns(UserWarning, match="gate: on held-out text"):
            report = run()
    else:
        report = run()
    assert report.held_out["calibrated"] > report.held_out["data-free"]
    assert isinstance(model.model.layers[0].mlp.up_proj, LiquidLinear)


@torch.no_grad()
def tokens_of(model):
    """Text that the float model is sure of: its own greedy continuations."""
    tokens = batches(1, seed=3)[0][:, :2]
    while tokens.shape[1] < 24:
        tokens = torch.cat((tokens, logits(model, tokens)[:, -1:].argmax(-1)), 1)
    return [tokens]


def test_losses_of_the_gate_are_those_of_the_models():
    model, data_free = make(), make()
    unseen = batches(2, seed=5)
    config = LiquidConfig("gptq", smooth=True, gate="off")
    report = quantize_(model, config, calibration=batches(), held_out=unseen, progress=False)
    quantize_(data_free, progress=False)
    for kind, one in (("reference", make()), ("data-free", data_free), ("calibrated", model)):
        losses = [
            nn.functional.cross_entropy(logits(one, b)[:, :-1].flatten(0, 1), b[:, 1:].flatten())
            for b in unseen
        ]
        assert report.held_out[kind] == pytest.approx(sum(losses).item() / 2, rel=1e-3), kind
    assert "loss on held-out text: reference" in str(report)


# Resuming.


def test_resume_gives_the_same_bits(tmp_path, monkeypatch):
    config = LiquidConfig("gptq", smooth=True, augment=64, gate="off")
    expected = make(kind="Qwen2")
    quantize_(expected, config, calibration=batches(), progress=False)

    model, run = make(kind="Qwen2"), driver._quantize_unit

    def interrupted(unit, *args):
        if unit.name == "model.layers.1":
            raise KeyboardInterrupt
        return run(unit, *args)

    monkeypatch.setattr(driver, "_quantize_unit", interrupted)
    before = state(model)
    options = {"calibration": batches(), "resume": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, **options)
    assert_same_state(model, before)
    files = ["block-0000.safetensors", "calibration.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files

    def second_only(unit, *args):
        assert unit.name == "model.layers.1"
        return run(unit, *args)

    monkeypatch.setattr(driver, "_quantize_unit", second_only)
    report = quantize_(model, config, **options)
    assert_same_state(model, state(expected))
    assert len(report.layers) == 14

    with pytest.raises(ValueError, match=r"resume: .* another config"):
        quantize_(make(kind="Qwen2"), LiquidConfig("gptq"), **options)
    with pytest.raises(ValueError, match=r"resume: .* another calibration"):
        quantize_(make(kind="Qwen2"), config, **{**options, "calibration": batches(seed=1)})
    with pytest.raises(ValueError, match=r"resume: .* other weights"):
        quantize_(make(kind="Qwen2", seed=1), config, **options)
