"""Models with experts: found whatever their class, quantized as a whole, or left with a reason."""

import warnings

import pytest
import reference
import torch
from moe_models import FAMILIES, IDS, moe_model
from torch import nn

from liquidgemm import (
    LiquidConfig,
    LiquidExperts,
    LiquidLinear,
    dequantize_,
    load_quantized,
    quantize_,
    quantize_weight,
    save_quantized,
)
from liquidgemm.quantization.experts import experts_as_linear


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LiquidExperts)}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_family(family, tmp_path):
    """Routers stay, all else is quantized; what is saved gives the same bits."""
    model = moe_model(family)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    report = quantize_(model, progress=False)
    assert report.verification.faults == {}
    found = experts_of(model)
    assert len(found) == FAMILIES[family].layers
    assert found.keys() == report.experts.keys() <= set(report.quantized)
    assert {name: p.size for name, p in report.parameters.items()} == sizes
    stacked = [p for n, p in report.parameters.items() if ".experts." in n and len(p.shape) == 3]
    assert stacked
    assert all(p.quantized for p in stacked)
    routers = [n for n in report.skipped if n.endswith((".gate", ".router", "shared_expert_gate"))]
    assert len(routers) >= len(found)
    assert f"and {4 * len(found)} experts in {len(found)} layers quantized" in str(report)
    save_quantized(model, tmp_path)
    y = logits(model)
    reference.assert_same(logits(load_quantized(tmp_path)), y)
    assert not experts_of(dequantize_(model))
    assert {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1} == sizes
    # Of most tokens: rounding of activations may send one to another expert.
    off = (logits(model) - y).norm(dim=-1) / y.norm(dim=-1)
    assert off.nanmedian() < 0.03


def test_the_codes_are_those_of_each_matrix():
    model = moe_model("Mixtral")
    floats = model.model.layers[1].mlp.experts
    first, second = floats.gate_up_proj[2].clone(), floats.down_proj[2].clone()
    quantize_(model, progress=False)
    experts = model.model.layers[1].mlp.experts
    for weight, expected in zip(experts.expert(2), (first, second), strict=True):
        for name in ("qweight", "qscale", "qoffset", "scale"):
            reference.assert_same(getattr(weight, name), getattr(quantize_weight(expected), name))
    # The floats that a user holds on to stay what they are.
    reference.assert_same(floats.gate_up_proj[2], first)


@pytest.mark.filterwarnings("ignore:keep")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"config": LiquidConfig(skip=("0.mlp.experts",))}, "matches the pattern '0.mlp.experts'"),
        (
            {"config": LiquidConfig(skip=("experts.3.down",))},
            "matches the pattern 'experts.3.down'",
        ),
        ({"config": LiquidConfig(keep=("experts.*",))}, "experts have no INT8 form"),
        ({"filter_fn": lambda name, _: "experts.1" not in name}, "rejected by filter_fn"),
    ],
)
def test_all_or_none_of_a_layers_experts(options, reason):
    model = moe_model("Mixtral")
    floats = model.model.layers[0].mlp.experts
    report = quantize_(model, progress=False, **options)
    assert reason in report.skipped["model.layers.0.mlp.experts"]
    assert model.model.layers[0].mlp.experts is floats
    kept = report.kept["model.layers.0.mlp.experts.gate_up_proj"]
    assert reason in kept.reason
    expected = 1 if "0.mlp.experts" in reason else 0
    assert len(experts_of(model)) == len(report.experts) == expected
    assert isinstance(model.model.layers[0].self_attn.q_proj, LiquidLinear)


def test_unknown_experts_are_reported():
    for fields, reason in (
        ({"hidden_act": "relu"}, "experts whose activation is none of silu_mul"),
        ({"hidden_act": "sigmoid"}, "experts whose activation is none of silu_mul"),
    ):
        model = moe_model("Mixtral", **fields)
        report = quantize_(model, progress=False)
        assert not experts_of(model)
        assert reason in report.skipped["model.layers.0.mlp.experts"]
        assert reason in str(report)
        assert len([p for p in report.kept.values() if len(p.shape) == 3]) == 4
    model = moe_model("Mixtral")
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
    report = quantize_(model, progress=False)
    assert "has hooks" in report.skipped["model.layers.0.mlp.experts"]
    with pytest.raises(ValueError, match=r"^model: experts that are the model itself: use Liquid"):
        quantize_(moe_model("Mixtral").model.layers[0].mlp.experts)


def test_a_dry_run_and_an_error_change_nothing():
    model = moe_model("Qwen3Moe")
    modules = list(model.modules())
    report = quantize_(model, dry_run=True)
    name = "model.layers.0.mlp.experts"
    assert report.plan[f"{name}.gate_up"].startswith("4 experts of 96 x 64, search, 4.25 bits")
    assert report.plan[f"{name}.down"].startswith("4 experts of 64 x 48, search, 5.67 bits")
    assert name in report.quantized
    assert list(model.modules()) == modules
    model.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] = torch.nan
    with pytest.raises(ValueError, match=r"1.mlp.experts.3.down: weight: expected finite"):
        quantize_(model)
    assert list(model.modules()) == modules


def test_quantized_experts_stay():
    model = moe_model("Mixtral")
    quantize_(model, LiquidConfig(skip=("q_proj",)), progress=False)
    before = experts_of(model)
    report = quantize_(model, LiquidConfig(skip=("k_proj",)), progress=False)
    assert experts_of(model) == before
    assert report.skipped["model.layers.0.mlp.experts"] == "already quantized"
    assert report.parameters["model.layers.0.mlp.experts.gate_up"].quantized
    assert report.experts == {}


def test_separate_experts_compute_the_same():
    for family in ("Mixtral", "GptOss", "Llama4"):
        model = moe_model(family)
        y = logits(model)
        with experts_as_linear(model) as experts:
            assert len(experts.paths) == 2
            assert torch.dist(logits(model), y) < 1e-5 * y.norm()
        reference.assert_same(logits(model), y)


def test_routers_that_are_linear_layers_stay():
    """Beside lists of experts as well, and not those elsewhere of the same size."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.shared_gate = nn.Linear(64, 4), nn.Linear(64, 1)
            self.shared = nn.Linear(64, 64)
            experts = (
                nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in "abcd"
            )
            self.experts = nn.ModuleList(experts)

    model = nn.ModuleDict({"layer": Layer(), "other": nn.Linear(64, 4)})
    report = quantize_(model, progress=False, verify=False)
    assert report.skipped == {
        "layer.router": "the router of layer.experts, of 4 rows",
        "layer.shared_gate": "the router of layer.experts, of 1 rows",
    }
    assert {"other", "layer.shared", "layer.experts.3.2"} < set(report.quantized)


def test_a_fault_in_experts_is_found(monkeypatch):
    """Gate and up the wrong way round."""
    from liquidgemm.nn.float_experts import Layout

    monkeypatch.setattr(Layout, "order", lambda self: torch.arange(2 * self.inner).roll(self.inner))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize_(moe_model("Mixtral"), progress=False)
    faults = report.verification.faults
    assert "from those of its experts alone" in faults["model.layers.0.mlp.experts"]
    assert any("0.mlp.experts" in str(w.message) for w in caught)


def test_a_damaged_checkpoint_of_experts(tmp_path):
    from safetensors.torch import load_file, save_file

    model = moe_model("Mixtral")
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.down.qscale"))
    lost = {k: v for k, v in tensors.items() if k != key}
    save_file(lost, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\..*qscale: missing in"):
        type(model).from_pretrained(tmp_path)
    tensors[key][0, 0, 0] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.down: .*expert 0: qscale, qoffset: expected"):
        type(model).from_pretrained(tmp_path)
