"""Tuning: the gate that it may not pass where it overfits, resuming, and what the report tells."""

import pytest
from tiny_models import assert_same_state, batches, logits, make, state

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration import driver


def test_the_gate_refuses_what_overfits():
    """One sequence, learned by heart: nearer to the float model there, and worse elsewhere."""
    seen, unseen = [b[:1] for b in batches(1)], batches(4, seed=5)
    model, before = make(), state(make())
    recipe = {"method": "hessian", "tune": 80}

    def run(gate):
        return quantize_(
            model,
            LiquidConfig(**recipe, gate=gate),
            calibration=seen,
            held_out=unseen,
            progress=False,
        )

    with pytest.raises(RuntimeError, match=r"the same before tuning .*fewer steps of tuning"):
        run("raise")
    assert_same_state(model, before)
    expected = logits(model, seen[0])
    report = run("off")
    tuned = (logits(model, seen[0]) - expected).norm()
    plain = make()
    quantize_(plain, LiquidConfig("hessian"), calibration=seen, progress=False)
    assert tuned < (logits(plain, seen[0]) - expected).norm()  # it has learned something
    assert report.held_out["calibrated"] > report.held_out["untuned"]


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
