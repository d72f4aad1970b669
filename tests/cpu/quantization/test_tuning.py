"""Tuning: the gate that it may not pass where it overfits, resuming, and what the report tells."""

import copy

import pytest
import torch
from tiny_models import assert_same_state, batches, make, state
from torch import nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration import driver


def test_the_gate_refuses_what_overfits():
    """Four tokens, learned by heart: nearer to the float model there, and worse elsewhere."""
    torch.manual_seed(0)
    seen, unseen = [torch.randn(1, 4, 96)], [torch.randn(4, 50, 96)]
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    plain, before = copy.deepcopy(model), state(model)
    expected = model(seen[0])

    def run(model, gate, tune):
        return quantize_(
            model,
            LiquidConfig(tune=tune, gate=gate),
            calibration=seen,
            held_out=unseen,
            progress=False,
        )

    with pytest.raises(RuntimeError, match=r"the same before tuning .*fewer steps of tuning"):
        run(model, "raise", 100)
    assert_same_state(model, before)
    losses = run(model, "off", 100).held_out
    run(plain, "off", 1)
    off = [(m(seen[0]) - expected).norm() for m in (model, plain)]
    assert off[0] < 0.7 * off[1]  # it has learned something
    assert losses["calibrated"] > 1.02 * losses["untuned"]


def test_interrupted_and_resumed_it_gives_the_same_bits_and_losses(tmp_path, monkeypatch):
    config = LiquidConfig("gptq", smooth=True, gate="off", tune=5)
    data = {"calibration": batches(), "held_out": batches(1, seed=5), "progress": False}
    expected = make()
    losses = quantize_(expected, config, **data).held_out
    assert losses.keys() == {"reference", "data-free", "calibrated", "untuned"}
    run = driver.tune_block

    def interrupted(*args):
        if len(list(tmp_path.glob("block-0000*"))) == 2:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(driver, "tune_block", interrupted)
    model = make()
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, resume=tmp_path, **data)
    monkeypatch.setattr(driver, "tune_block", run)
    assert quantize_(model, config, resume=tmp_path, **data).held_out == losses
    assert_same_state(model, state(expected))
    monkeypatch.setattr(driver, "tune_block", None)  # nothing is left to do
    model = make()
    assert quantize_(model, config, resume=tmp_path, **data).held_out == losses
    assert_same_state(model, state(expected))


def test_the_report_tells_what_activations_cost():
    """With 8 bits for weights too, most of the error is theirs; with 4, little of it."""
    shares = {}
    for keep in ((), ("*",)):
        config = LiquidConfig("gptq", keep=keep, gate="off")
        report = quantize_(make(), config, calibration=batches(), progress=False)
        shares[keep] = [layer.activation_share for layer in report.layers]
        assert "of activations" in [column.header for column in report.table().columns]
    assert max(shares[()]) < 0.3
    assert min(shares[("*",)]) > 0.3
