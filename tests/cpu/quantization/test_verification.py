"""The check at the end of quantize_: what it sees, what it says, and that it leaves no trace."""

import copy
import warnings
from dataclasses import replace

import pytest
import reference
import torch
from structures import IDS, structures
from tiny_models import assert_same_state, state
from torch import nn

import liquidgemm
from liquidgemm import LiquidConfig, LiquidLinear, quantize_
from liquidgemm.quantization import verification
from liquidgemm.quantization.calibration import driver
from liquidgemm.quantization.layer import quantize_layer
from liquidgemm.quantization.verification import Probe

STRUCTURES = structures()


class Net(nn.Module):
    """Two blocks, which do things that not every model does."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(2)
        )
        self.head = nn.Linear(64, 32)
        self.between = between or (lambda net, x: x)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.between(self, x))


def data(count=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 9, 64, generator=generator) for _ in range(count)]


def quantized(net, **options):
    return quantize_(net, calibration=data(), progress=False, **options).verification


# What it says.


def test_all_is_well():
    found = quantized(Net())
    assert found.faults == {}
    assert found.input == "the first of the calibration data"
    assert found.layers.keys() == {"blocks.0.1", "blocks.1.1", "head"}
    assert all(0.03 < error < 0.15 for error in found.layers.values())
    assert 0 < found.outputs["output"] < found.bound < 1
    assert found.unreached == ()
    assert str(found).startswith("verified on the first of the calibration data: outputs off by ")


def test_without_it():
    report = quantize_(Net(), progress=False, verify=False)
    assert report.verification is None
    assert "not verified: verify=False" in str(report)


def test_both_runs_count_layers(monkeypatch):
    """A model of gigabytes takes its time to run, before the first layer is quantized and after."""
    bars = []

    class Bar(verification.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(verification, "tqdm", Bar)
    quantize_(Net(), calibration=data())
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [
        ("running the float model", 3, 3),
        ("running the quantized model", 3, 3),
    ]
    bars.clear()
    quantized(Net())
    assert [bar.disable for bar in bars] == [True, True]


def test_no_input_and_no_run_are_no_silence():
    report = quantize_(Net(), progress=False)
    reason = "not verified as a whole: no input is known for it: pass calibration="
    assert str(report.verification) == reason
    assert reason in str(report)
    assert report.verification.layers.keys() == {"blocks.0.1", "blocks.1.1", "head"}

    def fails(net, x):
        raise KeyError("mode")

    probe = Probe(Net(fails), ["head"], data()[0])
    assert "the float model does not run on the first of" in str(probe.result)
    assert "model (Net): KeyError: 'mode'" in str(probe.result)


def test_layers_that_are_not_reached():
    net = Net()
    net.spare = nn.Linear(64, 16)
    found = quantized(net)
    assert found.unreached == ("spare",)
    assert 0.03 < found.layers["spare"] < 0.15
    assert "1 layers not reached" in str(found)


# Faults, planted.


@pytest.fixture
def planted(monkeypatch):
    """Plants a change of the layer that is put in the place of one of 64 x 64."""

    def plant(change):
        from_quantized = LiquidLinear.from_quantized.__func__

        def changed(cls, weight, bias=None, dtype=None):
            layer = from_quantized(cls, weight, bias, dtype)
            return change(layer) or layer

        monkeypatch.setattr(LiquidLinear, "from_quantized", classmethod(changed))

    return plant


def lose_bias(layer):
    layer.bias = None


def scale_rows(layer):
    layer.scale.mul_(1.1)


def one_code(layer):
    layer.packed[..., :64] = 0


def not_a_number(layer):
    layer.scale[3] = torch.nan


@pytest.mark.parametrize("fault", [lose_bias, scale_rows, one_code, not_a_number])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_wrong_layer_is_named(planted, fault, calibrated):
    planted(lambda layer: fault(layer) if layer.out_features == 32 else None)
    batches = data() if calibrated else None
    with pytest.warns(UserWarning, match=r"does not do what the float one did: head: "):
        report = quantize_(Net(), calibration=batches, progress=False)
    assert report.verification.faults.keys() >= {"head"}
    assert "FAULT: head: its outputs are off by" in str(report)


def test_a_wrong_model_is_noticed(monkeypatch):
    """Each layer does what its weight says, but one has the weight of another."""

    def swapped(*args, **kwargs):
        found = calibrate(*args, **kwargs)
        found.weights["blocks.0.1"] = found.weights["blocks.1.1"]
        return found

    calibrate = driver.calibrate
    monkeypatch.setattr(liquidgemm.quantization.model, "calibrate", swapped)
    with pytest.warns(UserWarning, match="more than the .* that rounding explains"):
        report = quantize_(Net(), LiquidConfig("gptq"), calibration=data(), progress=False)
    assert "blocks.0" in report.verification.faults


def test_a_bias_that_calibration_lost_is_noticed(monkeypatch):
    def lost(*args, **kwargs):
        found = calibrate(*args, **kwargs)
        del found.biases["blocks.1.1"]
        return found

    calibrate = driver.calibrate
    monkeypatch.setattr(liquidgemm.quantization.model, "calibrate", lost)
    with pytest.warns(UserWarning, match=r"blocks\.1\.1: it has lost its bias"):
        quantize_(Net(), LiquidConfig("gptq"), calibration=data(), progress=False)


def test_a_crash_names_the_layer():
    def reads(net, x):
        return x if isinstance(net.head, nn.Linear) else x @ net.head.weight.T

    with pytest.raises(RuntimeError, match=r"^model \(Net\): .*does not run on .*config's skip"):
        quantized(Net(reads))


# What it finds out before: code that reads the weight of a layer.


def read(net, x):
    return x + (x @ net.head.weight.T).mean()


def read_data(net, x):
    return x + net.head.weight.data.mean()


def only_ask(net, x):
    return x.to(net.head.weight.dtype).view(-1, net.head.weight.shape[1])


@pytest.mark.parametrize(("between", "left"), [(read, True), (read_data, True), (only_ask, False)])
def test_layers_whose_weight_is_read_outside_the_sources(between, left):
    net = Net(between)
    report = quantize_(net, calibration=data(), progress=False)
    assert (report.skipped == {"head": "its weight is read by Net"}) is left
    assert not report.verification.faults
    assert report.parameters["head.weight"].quantized is not left


# No trace.


def count_and_draw(net, x):
    net.calls = getattr(net, "calls", 0) + 1
    net.seen.append(x)
    net.total.add_(1)
    net.latest = net.latest + 1  # a new tensor in the place of a buffer
    net.spare.data.mul_(2)
    net.head.register_forward_hook(lambda *_: None)
    return x + torch.rand(1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_it_leaves_no_trace(calibrated):
    net = Net(count_and_draw).train()
    net.blocks[1].eval()
    net.seen = []
    net.register_buffer("total", torch.zeros(1))
    net.register_buffer("latest", torch.zeros(1))
    net.spare = nn.Parameter(torch.ones(3))
    modes = {name: module.training for name, module in net.named_modules()}
    generator = torch.get_rng_state()
    probe = Probe(net, ["head"], data()[0])
    assert probe.result.input
    if calibrated:
        quantize_(net, progress=False)  # no data: the layers alone
    assert {name: module.training for name, module in net.named_modules()} == modes
    reference.assert_same(torch.get_rng_state(), generator)
    assert not hasattr(net, "calls")
    assert net.seen == []
    assert net.total.item() == net.latest.item() == 0
    assert net.spare.tolist() == [1, 1, 1]
    assert not net.head._forward_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_torch_stays_as_it_was():
    """Nothing is left registered for all modules: torch.compile would warn of it ever after."""
    before = {
        name: dict(value)
        for name, value in vars(torch.nn.modules.module).items()
        if is_hooks(name, value)
    }
    assert before
    quantize_(Net(), LiquidConfig(), calibration=data(), progress=False)
    after = {
        name: dict(value)
        for name, value in vars(torch.nn.modules.module).items()
        if is_hooks(name, value)
    }
    assert after == before


def is_hooks(name, value):
    return name.startswith("_global_") and isinstance(value, dict)


@pytest.mark.parametrize("name", ["RWKV", "LLaVA"])
def test_models_of_transformers_stay_as_they_were(name):
    """The first call of RWKV divides its weights, that of LLaVA registers hooks."""
    model = STRUCTURES[name].make()
    before = state(model)
    attributes = [(copy.copy(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    assert Probe(model, [], None).result.input
    assert_same_state(model, before)
    for module, (known, hooks) in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == known.keys()
        assert len(module._forward_hooks) == hooks


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(liquidgemm.quantization.verification, "_BUDGET", 64 * 4 * 3 * 2)
    probe = Probe(Net(), ["blocks.0.1", "blocks.1.1", "head"], data()[0])
    assert {len(x) for x in probe._samples.values()} == {2}


def test_from_pretrained_says_so_if_it_could_not(tmp_path, monkeypatch):
    structure = STRUCTURES["GPT-2"]
    structure.make().save_pretrained(tmp_path)
    monkeypatch.setattr(liquidgemm.quantization.verification, "small_inputs", lambda *_: [])
    kind = type(structure.make())
    with pytest.warns(UserWarning, match="not verified as a whole: no input is known"):
        model = kind.from_pretrained(tmp_path, quantization_config=liquidgemm.LiquidGemmConfig())
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = liquidgemm.LiquidGemmConfig(verify=False)
        kind.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_with_adapters():
    peft = pytest.importorskip("peft")
    model = STRUCTURES["GPT-Neo"].make()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    found = quantize_(model, progress=False).verification
    assert found.input == "made up: input_ids"
    assert found.unreached == ()


def grows(gain, depth=3):
    """Errors grow from block to block, as each subtracts most of what it is given."""

    class Cancels(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight.data = gain * self.a.weight.data + 0.01 * torch.randn(64, 64)

        def forward(self, x):
            return torch.tanh(3 * (self.b(x) - gain * self.a(x)))

    torch.manual_seed(0)
    return nn.Sequential(*[Cancels() for _ in range(depth)]).eval()


def test_errors_that_grow_in_a_healthy_model_are_no_fault():
    torch.manual_seed(1)
    x = torch.randn(4, 16, 64)
    model = grows(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize_(model, LiquidConfig(), progress=False, calibration=[x])
    verification = report.verification
    rms = torch.tensor(list(verification.layers.values())).square().mean().sqrt().item()
    assert max(verification.outputs.values()) > 6 * rms  # or it would not be the case in question
    assert not verification.faults


def test_the_same_with_a_damaged_layer_is_one(monkeypatch):
    original = driver.quantize_layers

    def damaged(weights, *args):
        for name, (found, method) in zip(weights, original(weights, *args), strict=True):
            yield replace(found, scale=found.scale * (1.7 if name == "1.b" else 1)), method

    monkeypatch.setattr(driver, "quantize_layers", damaged)
    torch.manual_seed(1)
    x = torch.randn(4, 16, 64)
    with pytest.warns(UserWarning, match="1: off by"):
        quantize_(grows(0.5), LiquidConfig(), progress=False, calibration=[x])


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)])
def test_channels_that_give_nothing_are_named(monkeypatch, rows):
    """Also where no input of the model is known."""
    original = quantize_layer

    def damaged(weight, config, name="layer", *args):
        found, method = original(weight, config, name, *args)
        scale = found.scale.clone()
        scale[rows] = 0 if name == "2" else scale[rows]
        return replace(found, scale=scale), method

    monkeypatch.setattr("liquidgemm.quantization.model.quantize_layer", damaged)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="2: .* of 64 output channels looked at give nothing"):
        quantize_(model, progress=False)
