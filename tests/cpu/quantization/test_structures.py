"""CHECKLIST 23: models by structure, quantized, saved by both writers, loaded by both readers."""

import copy

import pytest
import reference
import torch
from structures import T, plain_structures, structures
from tiny_models import assert_same_state, state

from liquidgemm import (
    LiquidConfig,
    LiquidExperts,
    LiquidLinear,
    load_quantized,
    quantize_,
    save_quantized,
)

STRUCTURES, PLAIN = structures(), plain_structures()


def values(output) -> list[torch.Tensor]:
    """The float tensors of an output, one level deep."""
    items = output.values() if isinstance(output, dict) else [output]
    return [x for x in items if isinstance(x, torch.Tensor) and x.is_floating_point()]


@torch.no_grad()
def run(model, structure):
    return values(model(**structure.inputs))


def check_quantized(model, structure, expected, report):
    assert len(report.quantized) == structure.layers, report.skipped
    for name in report.quantized:
        assert isinstance(model.get_submodule(name), LiquidLinear | LiquidExperts)
    for name, reason in structure.kept.items():
        assert reason in report.skipped[name]
    assert report.verification.faults == {}
    pairs = [(a, b) for a, b in zip(run(model, structure), expected, strict=True) if b.numel() > 15]
    assert pairs or len(expected) == 1
    for actual, wanted in pairs:
        assert torch.dist(actual, wanted) < 0.3 * wanted.norm()


def sizes(model) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_model_of_transformers(tmp_path, name):
    """CHECKLIST 23"""
    structure = STRUCTURES[name]
    model = structure.make()
    # Copies, as the first call of some changes their weights.
    expected, accounted = run(copy.deepcopy(model), structure), sizes(model)
    report = quantize_(model, progress=False)
    check_quantized(copy.deepcopy(model), structure, expected, report)
    assert {key: p.size for key, p in report.parameters.items()} == accounted
    assert not report.verification.reason, report.verification
    quantized, before = run(copy.deepcopy(model), structure), state(model)
    save_quantized(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for load in (load_quantized, getattr(T, type(model).__name__).from_pretrained):
            other = load(tmp_path / folder)
            assert_same_state(other, before)
            for actual, wanted in zip(run(other, structure), quantized, strict=True):
                reference.assert_same(actual, wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_module(tmp_path, name):
    """CHECKLIST 22, 23"""
    structure = PLAIN[name]
    model = structure.make()
    expected, accounted = run(model, structure), sizes(model)
    report = quantize_(model, LiquidConfig(), progress=False)
    check_quantized(model, structure, expected, report)
    assert {key: p.size for key, p in report.parameters.items()} == accounted
    assert "no input is known" in str(report.verification)
    save_quantized(model, tmp_path)
    other = load_quantized(tmp_path, model=structure.make())
    assert_same_state(other, state(model))
    for actual, wanted in zip(run(other, structure), run(model, structure), strict=True):
        reference.assert_same(actual, wanted)


def test_shared_blocks_stay_shared():
    model = PLAIN["shared blocks"].make()
    quantize_(model, progress=False)
    assert model.blocks[0] is model.blocks[1] is model.blocks[2]
    assert model.head.weight is model.embed.weight
