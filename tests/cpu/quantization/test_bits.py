"""Bits of layers: by patterns, and within a budget by what they do to the output."""

import json
import warnings

import pytest
import torch
from torch import nn

import liquidgemm
from liquidgemm import LiquidConfig, quantize_, quantize_weight
from liquidgemm.quantization.budget import Choice, choose, stored_bits

BLOCK_BYTES = {2176: 4, 3200: 6, 4096: 8}


class Net(nn.Module):
    """Two layers of one input, one of which hardly counts, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(256, 128, bias=False), nn.Linear(256, 128, bias=False)
        self.quiet = nn.Linear(256, 128, bias=False)
        self.out = nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return self.out(self.a(x).relu() * self.b(x) + 1e-3 * self.quiet(x.flip(-1)))


def bits_of(model):
    return {
        name: BLOCK_BYTES[layer.packed.shape[-1]]
        for name, layer in model.named_modules()
        if isinstance(layer, liquidgemm.LiquidLinear)
    }


@pytest.fixture(scope="module")
def data():
    return [torch.randn(64, 256, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("method", ["search", "rtn", "gptq"])
def test_more_bits_lose_less(method, data):
    """And the numbers of bits that were asked for are those that are held; keep goes first."""
    x, expected = data[0], Net()(data[0])
    errors = []
    for bits in (4, 6, 8):
        model = Net()
        config = LiquidConfig(method=method, bits={"quiet": 4, "*": bits}, keep=("out",))
        given = {"calibration": data} if method == "gptq" else {}
        report = quantize_(model, config, progress=False, **given)
        assert bits_of(model) == {"a": bits, "b": bits, "quiet": 4, "out": 8}
        assert model.liquid_config == config
        errors.append(((model(x) - expected).norm() / expected.norm()).item())
        stored = {layer.name: layer.bits for layer in report.layers}
        assert stored["a"] == pytest.approx({4: 4.25, 6: 6.25, 8: 8}[bits] + 32 / 256)
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1]


def test_six_bits_of_a_weight():
    """The error of four, over 16 less what steps of integers leave; all the rows of a chunk."""
    w = torch.randn(70, 200, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    error = {}
    for bits in (4, 6):
        for method in ("search", "rtn"):
            weight = quantize_weight(w, method=method, bits=bits)
            assert weight.is_six_bits == (bits == 6)
            left = liquidgemm.dequantize_weight(weight) - w
            assert not left[3].any()
            error[bits, method] = (left.square().sum() / w.square().sum()).item()
    for method in ("search", "rtn"):
        assert error[6, method] < error[4, method] / 10
    assert error[6, "search"] <= error[6, "rtn"]
    with pytest.raises(ValueError, match=r"bits: expected one of \(4, 6\), got 5"):
        quantize_weight(w, bits=5)
    with pytest.raises(ValueError, match=r"bits: expected one of \(4, 6\), got 6\.0"):
        quantize_weight(w, bits=6.0)


def test_a_checkpoint_holds_them(tmp_path):
    """CHECKLIST 19: saved and loaded, to the bit."""
    model = Net()
    quantize_(model, LiquidConfig(bits={"a": 6, "out": 8}), progress=False)
    liquidgemm.save_quantized(model, tmp_path)
    loaded = liquidgemm.load_quantized(tmp_path, Net())
    assert bits_of(loaded) == bits_of(model) == {"a": 6, "b": 4, "quiet": 4, "out": 8}
    x = torch.randn(5, 256)
    assert torch.equal(loaded(x), model(x))
    assert loaded.liquid_config == LiquidConfig(bits={"a": 6, "out": 8})


@pytest.mark.parametrize("budget", [5.0, 6.5, 7.4])
def test_a_budget_is_kept_and_spent_where_it_counts(budget, data):
    model = Net().train()
    config = LiquidConfig(method="gptq", budget=budget)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = quantize_(model, config, progress=False, calibration=data, dry_run=True).plan
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    quantize_(model, config, progress=False, calibration=data)
    found = bits_of(model)
    assert found["a"] == found["b"]  # of one input
    assert found["quiet"] <= min(found.values())
    assert max(found.values()) > 4
    layers = {name: layer for name, layer in model.named_modules() if name in found}
    weights = sum(layer.weight.numel() for layer in layers.values())
    stored = sum(8 * (layer.packed.nbytes + layer.scale.nbytes) for layer in layers.values())
    assert stored <= budget * weights
    assert model.liquid_config == LiquidConfig(method="gptq", bits=found)
    for name, bits in found.items():
        assert f"{ {4: 4.25, 6: 6.25, 8: 8}[bits]:.2f} bits per weight" in plan[name]


def test_what_is_kept_counts(data):
    model = Net()
    config = LiquidConfig(budget=5.0, keep=("out",))
    quantize_(model, config, progress=False, calibration=data)
    assert bits_of(model)["out"] == 8
    # What is recorded asks for the same, and for nothing twice.
    again = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(again, model.liquid_config, progress=False, verify=False)
    assert bits_of(again) == bits_of(model)
    with pytest.raises(ValueError, match=r"budget: expected at least 4\.9\d bits per weight"):
        quantize_(Net(), LiquidConfig(budget=4.6, keep=("out",)), progress=False, calibration=data)


def test_choosing_is_by_what_a_step_gains_for_its_bits():
    """Against all choices there are."""
    generator = torch.Generator().manual_seed(0)
    stored = {4: 425, 6: 625, 8: 800}
    for _ in range(20):
        losses = torch.rand(5, generator=generator).tolist()
        choices = [
            Choice((str(i),), {4: loss, 6: 0.08 * loss, 8: 0.01 * loss}, stored)
            for i, loss in enumerate(losses)
        ]
        room = 5 * 425 + 3 * 200
        chosen = choose(choices, room)
        assert sum(stored[bits] for bits in chosen) <= room
        upgraded = {i for i, bits in enumerate(chosen) if bits > 4}
        largest = sorted(range(5), key=lambda i: losses[i])[-3:]
        assert upgraded == set(largest)
    assert choose(choices, 1) == [4] * 5
    assert choose(choices, 5 * 800) == [8] * 5


def test_stored_bits_are_those_of_a_layer():
    for bits in (4, 6, 8):
        model = nn.Sequential(nn.Linear(200, 100))
        quantize_(model, LiquidConfig(bits={"0": bits}), progress=False)
        held = 8 * (model[0].packed.nbytes + model[0].scale.nbytes)
        assert stored_bits(100, 200, bits) == held


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": {"a": 5}}, r"bits: expected one of \(4, 6, 8\) per pattern"),
        ({"bits": {"a": True}}, "bits: expected one of"),
        ({"bits": 6}, "bits: expected one of"),
        ({"budget": 0}, "budget: expected a finite number of bits per weight > 0, got 0"),
        ({"budget": True}, "budget: expected a finite number"),
        ({"budget": float("nan")}, "budget: expected a finite number"),
        ({"budget": 5.0, "bits": {"a": 6}}, "bits: expected none with a budget"),
        ({"budget": 5.0, "augment": 64}, "augment: expected 0 with a budget"),
    ],
)
def test_settings_that_are_not_understood(settings, message):
    """CHECKLIST 7."""
    with pytest.raises(ValueError, match=message):
        LiquidConfig(**settings)


def test_a_budget_needs_data_and_room(data):
    """CHECKLIST 7: before anything is changed."""
    model = Net()
    with pytest.raises(ValueError, match=r"calibration: expected .* for budget"):
        quantize_(model, LiquidConfig(budget=5.0), progress=False)
    with pytest.raises(ValueError, match=r"calibration: expected .* for budget"):
        quantize_(model, LiquidConfig(budget=5.0), progress=False, dry_run=True)
    with pytest.raises(ValueError, match=r"budget: expected at least 4\.\d\d bits per weight"):
        quantize_(model, LiquidConfig(budget=4.0), progress=False, calibration=data)
    assert bits_of(model) == {}


def test_a_pattern_of_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="bits: 'nowhere' matches none of the layers"):
        quantize_(Net(), LiquidConfig(bits={"nowhere": 6}), progress=False)
    for settings in ({"bits": {"*": 6, "out": 8}}, {"bits": {"out": 6}, "keep": ("out",)}):
        with pytest.warns(UserWarning, match="bits: 'out' decides for no layer"):
            quantize_(Net(), LiquidConfig(**settings), progress=False)


def test_a_layer_says_its_bits():
    model = Net()
    quantize_(model, LiquidConfig(bits={"a": 6, "out": 8}), progress=False)
    told = [repr(getattr(model, name)) for name in ("a", "b", "out")]
    assert [text.partition("bits=")[2] for text in told] == ["6)", "", "8)"]


def test_losses_that_are_not_finite(data):
    """CHECKLIST 7: a sensitivity that is a NaN is an error, and not 4 bits."""

    class Delicate(Net):
        """A NaN as soon as the weight of one layer is another."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("copy", self.a.weight.detach().T.clone())

        def forward(self, x):
            return super().forward(x) + (1 - 100 * (self.a(x) - x @ self.copy).abs().amax()).log()

    with pytest.raises(ValueError, match="calibration: expected outputs that are finite"):
        quantize_(Delicate(), LiquidConfig(budget=5.0), progress=False, calibration=data)


def test_what_the_sample_does_not_reach_is_not_forgotten(data):
    """A layer that is never called is judged as most others are."""

    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(256, 256)

    model = Idle()
    quantize_(model, LiquidConfig(budget=7.9), progress=False, calibration=data)
    assert bits_of(model)["idle"] > 4


def test_configs_survive_json():
    for config in (LiquidConfig(bits={"a.*": 6, "b": 8}), LiquidConfig(budget=5.5)):
        assert LiquidConfig.from_json(config.to_json()) == config
    assert json.loads(LiquidConfig().to_json())["bits"] == {}


@pytest.mark.parametrize("field", ["bits", "augment"])
def test_the_order_of_patterns_survives_sorted_keys(field):
    """The first that matches counts, and what writes a config.json sorts the keys of objects."""
    values = {"z": 8, "a": 4} if field == "bits" else {"z": 128, "a": 64}
    config = LiquidConfig(**{field: values})
    text = json.dumps(json.loads(config.to_json()), sort_keys=True)
    assert list(getattr(LiquidConfig.from_json(text), field).items()) == list(values.items())
    # As checkpoints have it that were saved before.
    older = LiquidConfig.from_json(json.dumps({field: values}))
    assert list(getattr(older, field).items()) == list(values.items())
    pairs = [list(pair) for pair in values.items()]
    for wrong, message in (
        ([*pairs, pairs[0]], "expected each pattern once"),
        ([["z"]], "expected pairs of a pattern and a value"),
        ([[1, 64]], "expected pairs of a pattern and a value"),
        ([["z", "8"]], f"{field}: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            LiquidConfig.from_json(json.dumps({field: wrong}))
