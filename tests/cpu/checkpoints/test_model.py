"""quantize_ on plain modules, and its config."""

import pytest
import reference
import torch
from plain_models import (
    QUANTIZED,
    Net,
    make,
    run,
)
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, quantize_

# LiquidConfig.


def test_config_json_round_trip():
    for config in (LiquidConfig(), LiquidConfig("rtn", 128, ("a", "b.*"))):
        assert LiquidConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "magic"}', "method: .*'magic'"),
        ('{"group_size": 48}', "group_size: .*48"),
        ('{"skip": "lm_head"}', "skip: .*'lm_head'"),
        ('{"skip": [1]}', "skip: "),
        ('{"digits": 3}', r"expected fields among .*got \['digits'\]"),
        ("[]", "expected a JSON object, got list"),
        ("{", "Expecting"),
    ],
)
def test_config_is_checked(text, message):
    with pytest.raises(ValueError, match=message):
        LiquidConfig.from_json(text)


# quantize_.


def test_quantize_and_report():
    net = make(quantized=False)
    before = run(net)
    report = quantize_(net, progress=False)
    assert sorted(report.quantized) == sorted(QUANTIZED)
    assert report.skipped == {
        "embed": "not nn.Linear but Embedding",
        "lm_head": "matches the pattern 'lm_head'",
    }
    weights = 2 * 2 * 96 * 200 + 96 * 96
    assert report.bytes_before == 4 * weights
    # Blocks of 64 x 64 and a scale per row; the sizes here leave much of the last block empty.
    blocks = 2 * (4 * 2 + 2 * 4) + 2 * 2
    assert report.bytes_after == 2176 * blocks + 4 * (2 * 200 + 3 * 96)
    assert "5 linear layers quantized" in str(report)
    assert "skipped lm_head: matches the pattern 'lm_head'" in str(report)
    for name in QUANTIZED:
        assert isinstance(net.get_submodule(name), LiquidLinear), name
        assert not net.get_submodule(name).training
    assert net.blocks[2] is net.blocks[0]
    after = run(net)
    assert 0 < torch.dist(after, before) < 0.2 * before.norm()


def test_the_config_reaches_the_layers():
    net, dense = make(quantized=False), make(quantized=False)
    quantize_(net, LiquidConfig("rtn", -1), progress=False)
    expected = LiquidLinear.from_linear(dense.pool, group_size=-1, method="rtn")
    reference.assert_same(net.pool.packed, expected.packed)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("pool", ["pool"]),
        ("up", ["blocks.0.up", "blocks.1.up"]),
        ("blocks.1.*", ["blocks.1.up", "blocks.1.down"]),
        ("blocks.2.up", ["blocks.0.up"]),  # another name of the same layer
        ("ool", []),
        ("[bl]*", [name for name in [*QUANTIZED, "lm_head"] if name != "pool"]),
    ],
)
def test_skip_patterns(pattern, names):
    report = quantize_(make(quantized=False), LiquidConfig(skip=(pattern,)), progress=False)
    reason = f"matches the pattern {pattern!r}"
    assert sorted(name for name, why in report.skipped.items() if why == reason) == sorted(names)


def test_filter_function():
    seen = []

    def only_wide(name, module):
        seen.append(name)
        return module.out_features > 96

    report = quantize_(make(quantized=False), filter_fn=only_wide, progress=False)
    assert sorted(seen) == sorted(QUANTIZED)
    assert sorted(report.quantized) == ["blocks.0.up", "blocks.1.up"]
    assert report.skipped["pool"] == "rejected by filter_fn"


def test_what_cannot_be_replaced_is_skipped_with_its_reason():
    class Subclass(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(
        {
            "ok": nn.Linear(64, 64),
            "subclass": Subclass(64, 64),
            "wide": nn.Linear(64, 64).double(),
            "hooked": nn.Linear(64, 64),
            "tied": nn.Linear(64, 64),
            "twin": nn.Linear(64, 64),
            "attention": nn.MultiheadAttention(64, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "done": LiquidLinear(64, 64),
        }
    )
    net["twin"].weight = net["tied"].weight
    net["hooked"].register_forward_hook(lambda *_: None)
    report = quantize_(net, progress=False)
    assert report.quantized == ("ok",)
    assert report.skipped == {
        "subclass": "not nn.Linear but Subclass",
        "wide": "its dtype is torch.float64",
        "hooked": "it has hooks, which would be lost",
        "tied": "its weight is tied to another module's",
        "twin": "its weight is tied to another module's",
        "attention": "not nn.Linear but MultiheadAttention",
        "attention.out_proj": "not nn.Linear but NonDynamicallyQuantizableLinear",
        "conv": "not nn.Linear but Conv1d",
        "done": "already quantized",
    }


def test_a_tied_head_is_not_quantized_without_the_pattern():
    report = quantize_(make(quantized=False), LiquidConfig(skip=()), progress=False)
    assert report.skipped["lm_head"] == "its weight is tied to another module's"


def test_a_bare_linear_is_refused():
    with pytest.raises(ValueError, match=r"model: .*LiquidLinear.from_linear"):
        quantize_(nn.Linear(64, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_leaves_the_model_as_it_was(bad):
    """CHECKLIST 7: the layer and row are named, and no other layer has been replaced."""
    net = make(quantized=False)
    net.pool.weight.data[17, 3] = bad
    with pytest.raises(ValueError, match=r"pool: weight: expected finite.*row 17"):
        quantize_(net, progress=False)
    assert not [m for m in net.modules() if isinstance(m, LiquidLinear)]
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match=r"blocks.0.up: .*meta"):
        quantize_(net, progress=False)


def test_rows_with_an_outlier_are_reported():
    net = make(quantized=False)
    net.blocks[1].down.weight.data[5, 7] = 100.0
    report = quantize_(net, progress=False)
    assert report.coarse_rows == {"blocks.1.down": 1}
    assert "1 rows in 1 layers have outliers" in str(report)


def test_progress_bar(capfd):
    quantize_(make(quantized=False), progress=True)
    assert "quantizing: 100%" in capfd.readouterr().err
    quantize_(make(quantized=False), progress=False)
    assert capfd.readouterr().err == ""
