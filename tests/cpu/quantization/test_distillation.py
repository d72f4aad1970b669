"""Distillation: scales and gains of the whole model, chosen, judged and refused."""

import copy

import pytest
import torch
from tiny_models import assert_same_state, batches, make, state
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, quantize_
from liquidgemm.quantization.calibration.measure import divergence

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


def away(model, original, data):
    """Mean KL divergence from the float model."""
    with torch.no_grad():
        found = [divergence(original, b, model(b), original(b)).item() for b in data]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def pair():
    """A float model, one quantized by the search, the same distilled, and both reports."""
    original = make(**SIZES)
    made = []
    for distill in (0, 24):
        model = copy.deepcopy(original)
        config = LiquidConfig(bits={"v_proj": 6, "o_proj": 8}, distill=distill, gate="off")
        report = quantize_(
            model,
            config,
            calibration=batches(8),
            held_out=batches(2, seed=5),
            progress=False,
        )
        made.append((model, report))
    return original, *made


def test_it_is_nearer_to_the_float_model(pair):
    original, (plain, _), (distilled, _) = pair
    data = batches(8)
    assert away(distilled, original, data) < 0.9 * away(plain, original, data)


def test_codes_stay_and_scales_and_gains_move(pair):
    _, (plain, _), (distilled, _) = pair
    ours = {n: m for n, m in distilled.named_modules() if isinstance(m, LiquidLinear)}
    assert ours
    for name, layer in ours.items():
        other = plain.get_submodule(name)
        for part in ("qweight", "qscale", "qoffset"):
            assert torch.equal(getattr(layer, part), getattr(other, part)), name
        assert not torch.equal(layer.scale, other.scale), name
        assert (layer.scale / other.scale - 1).abs().max() < 0.05
    moved = {
        name
        for name, p in distilled.named_parameters()
        if not torch.equal(p, plain.get_parameter(name))
    }
    assert moved == {name for name, p in distilled.named_parameters() if p.dim() == 1}


def test_what_is_judged_is_what_is_delivered(pair):
    _, (plain, before), (distilled, report) = pair
    assert "undistilled" not in before.held_out
    losses = report.held_out
    assert losses["undistilled"] == pytest.approx(before.held_out["calibrated"], rel=1e-5)
    for model, kind in ((plain, "undistilled"), (distilled, "calibrated")):
        data = batches(2, seed=5)
        with torch.no_grad():
            logits = [model(b).logits[:, :-1] for b in data]
        targets = [b[:, 1:] for b in data]
        loss = nn.functional.cross_entropy(
            torch.cat([x.flatten(0, 1) for x in logits]), torch.cat([t.flatten() for t in targets])
        )
        assert losses[kind] == pytest.approx(loss.item(), rel=1e-5)


def test_the_gate_refuses_what_overfits():
    """Four tokens, learned by heart."""
    torch.manual_seed(0)
    seen, unseen = [torch.randn(1, 4, 96)], [torch.randn(4, 50, 96)]
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    before = state(model)
    arguments = {"calibration": seen, "held_out": unseen, "progress": False}
    with pytest.raises(RuntimeError, match=r"before distillation .*fewer steps of distillation"):
        quantize_(model, LiquidConfig(distill=100), **arguments)
    assert_same_state(model, before)
    losses = quantize_(model, LiquidConfig(distill=100, gate="off"), **arguments).held_out
    assert losses["calibrated"] > losses["undistilled"]


@pytest.mark.parametrize("kind", ["Mixtral", "GPT2", "Bert"])
def test_other_models_in_bfloat16(kind):
    """Experts, Conv1D, and a model that is judged by its outputs."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    if kind == "Bert":
        import transformers

        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
        )
        model = transformers.BertModel(config).eval()
        data = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches(8)]
    else:
        model, data = make(kind, num_hidden_layers=1, **experts), batches(8)
    model = model.to(torch.bfloat16)
    vars(model)["float"] = None  # transformers refuses it for what was a GGUF file
    plain = copy.deepcopy(model)
    for one, distill in ((model, 4), (plain, 0)):
        config = LiquidConfig("hessian", distill=distill, gate="off")
        quantize_(one, config, calibration=data, progress=False)
    assert model.dtype == torch.bfloat16
    scales = [n for n in state(plain) if n.endswith("scale") and "qscale" not in n]
    assert scales
    moved = [n for n in scales if not torch.equal(state(model)[n], state(plain)[n])]
    assert len(moved) == len(scales)
