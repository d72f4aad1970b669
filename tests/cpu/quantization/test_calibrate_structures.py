"""Calibration of models of each structure: every linear layer, on what it really gets."""

import copy
from dataclasses import dataclass

import pytest
import reference
import torch
from outlier_models import MODELS, build, off, outputs
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, load_quantized, quantize_, save_quantized
from liquidgemm.quantization.calibration import driver, simulate
from liquidgemm.quantization.calibration.flow import Flow

SKIP = ("lm_head", "proj_out")
# How much of the error without data calibration has to leave at most: there is little to gain where
# attention is all that goes wrong, or where a head sees 16 tokens.
LEAVES = {"whisper": 0.6, "bart": 1.05, "bert": 0.8, "bert_head": 0.6, "albert": 1.05,
          "vit": 1.0, "llava": 0.95, "t5": 1.05}  # fmt: skip

# Of these models rounding is a large part of what they compute.
pytestmark = pytest.mark.filterwarnings("ignore:the quantized model does not do")


def linears(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LiquidLinear)}


def biases(model):
    kinds = nn.Linear | LiquidLinear
    return {n: m.bias for n, m in model.named_modules() if isinstance(m, kinds)}


def quiet(model, config, *args, **options):
    return quantize_(model, config, *args, progress=False, **options)


@pytest.mark.filterwarnings("ignore:.*tokens are too few")
@pytest.mark.parametrize("name", MODELS)
def test_structures(name, tmp_path):
    """Every layer is calibrated, biases stay, and what was not seen comes out better."""
    model, batches = build(name, 10)
    seen, unseen = batches[:8], batches[8:]
    expected = [outputs(model, batch) for batch in unseen]
    data_free, before = copy.deepcopy(model), biases(model)
    quiet(data_free, LiquidConfig(skip=SKIP))

    config = LiquidConfig("gptq", skip=SKIP, gate="off")
    report = quiet(model, config, calibration=seen, held_out=unseen)
    assert linears(model).keys() == linears(data_free).keys()
    assert {layer.name for layer in report.layers} == linears(model).keys()
    assert all(layer.tokens > 0 and not layer.note for layer in report.layers)
    assert off(model, unseen, expected) < LEAVES[name] * off(data_free, unseen, expected)
    for key, bias in biases(model).items():
        assert (bias is None) == (before[key] is None), key
        if bias is not None:
            reference.assert_same(bias, before[key], key=key)

    measure = {"bert": "relative output error", "albert": "relative output error",
               "vit": "relative output error", "whisper": "loss", "llava": "loss"}  # fmt: skip
    assert report.measure == measure.get(name, "loss on labels")
    assert report.measure in str(report)
    if report.measure == "relative output error":
        assert report.held_out["reference"] == 0
    assert report.held_out["calibrated"] != report.held_out["data-free"]

    save_quantized(model, tmp_path)
    reference.assert_same(outputs(load_quantized(tmp_path), unseen[0]), outputs(model, unseen[0]))


def test_one_call_is_encoder_and_then_decoder_by_hand(monkeypatch):
    """To the bit: the decoder's cross-attention sees what the quantized encoder gives."""
    # So that a simulated encoder computes what the real one does.
    monkeypatch.setattr(simulate._cpu, "is_fast", lambda: True)
    config = LiquidConfig("gptq", smooth=True, skip=SKIP, gate="off")
    whole, batches = build("whisper")
    quiet(whole, config, calibration=batches)

    halves, _ = build("whisper")
    for half in ("encoder", "decoder"):
        quiet(halves, config, lambda name, _, half=half: f".{half}." in name, calibration=batches)
    assert linears(halves).keys() == linears(whole).keys()
    for key, value in whole.state_dict().items():
        reference.assert_same(halves.state_dict()[key], value, key=key)


def test_the_model_is_run_once_for_a_chain_of_blocks(monkeypatch):
    """What surrounds blocks is not run anew for each of them, nor are they all kept in memory."""
    model, batches = build("whisper", 1)
    runs, original = [], Flow._replay
    monkeypatch.setattr(Flow, "_replay", lambda self, ask: runs.append(1) or original(self, ask))
    flows = []
    init = Flow.__init__
    monkeypatch.setattr(
        Flow, "__init__", lambda self, *args: flows.append(self) or init(self, *args)
    )
    quiet(model, LiquidConfig("hessian", skip=SKIP), calibration=batches)
    assert len(runs) == 2  # encoder, decoder
    (flow,) = flows
    (first, _), (last, _) = flow._given[:2]  # of the encoder
    assert first.untyped_storage().nbytes() < 100
    assert last.untyped_storage().nbytes() > 100


def test_data_is_only_for_what_is_reached():
    """Batches of texts alone leave a vision tower to the search without data, and it says so."""
    model, batches = build("llava", 4)
    texts = [{"input_ids": batch["input_ids"] % 60} for batch in batches]
    config = LiquidConfig("gptq", skip=SKIP, gate="off")
    plan = quantize_(model, config, calibration=texts, dry_run=True).plan
    report = quiet(model, config, calibration=texts)
    for layer in report.layers:
        reached = "language_model" in layer.name
        assert (layer.tokens > 0) == reached, layer
        assert layer.method == ("gptq" if reached else "search")
        assert bool(layer.note) != reached
        assert ("not reached by the calibration data" in plan[layer.name]) != reached
        assert f", {layer.method}, " in plan[layer.name]
    assert "quantized without data model.vision_tower" in str(report)


def test_batches_of_several_kinds():
    """With images and without: the language model is calibrated on both, in its place."""
    model, batches = build("llava", 4)
    texts = [{"input_ids": batch["input_ids"] % 60} for batch in batches[:2]]
    report = quiet(model, LiquidConfig("hessian"), calibration=[*texts, *batches[2:]])
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens["model.language_model.layers.0.mlp.up_proj"] == 4 * 2 * 24
    assert tokens["model.multi_modal_projector.linear_1"] == 2 * 2 * 16


# Plain modules.


class Block(nn.Module):
    """Gives its output in one of several forms."""

    def __init__(self, form="tensor", size=64):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 2 * size)
        self.down, self.form = nn.Linear(2 * size, size), form

    def forward(self, x):
        x = x + self.down(self.up(self.norm(x)).relu())
        return FORMS[self.form](x)


@dataclass(frozen=True)
class Given:
    """What a block gives."""

    hidden: torch.Tensor
    extra: None = None


FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "list": lambda x: [x],
    "dict": lambda x: {"hidden": x, "extra": 3},
    "record": Given,
}
OPEN = {
    "tensor": lambda x: x,
    "tuple": lambda x: x[0],
    "list": lambda x: x[0],
    "dict": lambda x: x["hidden"],
    "record": lambda x: x.hidden,
}


class Net(nn.Module):
    """A stem, lists of blocks called in an order of its own, and a head."""

    def __init__(self, order, lists=1, form="tensor", blocks=2):
        super().__init__()
        self.order, self.form = order, form
        self.lists = nn.ModuleDict(
            {str(i): nn.ModuleList([Block(form) for _ in range(blocks)]) for i in range(lists)}
        )
        self.stem, self.head = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        for which, index in self.order:
            x = OPEN[self.form](self.lists[str(which)][index](x))
        return self.head(x)


class Towers(nn.Module):
    """Two towers in a list, whose blocks are in lists of lists; one sees what the other gives."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])
        self.between, self.unused = nn.Linear(64, 64), nn.ModuleList([Block()])

    def forward(self, x):
        first = x
        for block in self.towers[1]:  # the second one comes first
            first = block(first)
        second = self.between(first)
        for block in self.towers[0]:
            second = block(second) + first
        return {"first": first, "second": second}


class Direct(nn.Module):
    """Calls the parts of the entries of its list, never the entries."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block.down(block.up(block.norm(x)).relu())
        return x


class Turns(nn.Module):
    """A list that is called once for each token."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = self.cells[0](x[:, t] + state).tanh()
        return state


STRAIGHT = [(0, 0), (0, 1)]
PLAIN = {
    **{form: (lambda form=form: Net(STRAIGHT, form=form), 32) for form in FORMS},
    "backwards": (lambda: Net([(0, 1), (0, 0)]), 32),
    "twice": (lambda: Net(STRAIGHT * 2), 32),
    "interleaved": (lambda: Net([(0, 0), (1, 0), (0, 1), (1, 1)], lists=2), 32),
    "last list first": (lambda: Net([(1, 0), (1, 1), *STRAIGHT], lists=2), 32),
    "towers": (Towers, 64),
    "parts of entries": (Direct, 64),
    "for each token": (Turns, 64),
}


def plain(name, count=6):
    make, size = PLAIN[name]
    torch.manual_seed(0)
    x = [torch.randn(2, 6 + i % 2 * (name == "for each token"), size) for i in range(count)]
    for batch in x:
        batch[..., 5] *= 30
    return make().eval(), x


@pytest.mark.filterwarnings("ignore:.*tokens are too few")
@pytest.mark.parametrize("tune", [0, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules(name, tune):
    """Inputs of each layer are those that it gets in the quantized model."""
    model, x = plain(name)
    before = biases(model)
    config = LiquidConfig("hessian", gate="off", tune=tune)
    report = quiet(model, config, calibration=x[:4], held_out=x[4:])
    for key, bias in biases(model).items():
        reference.assert_same(bias, before[key], key=key)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens.keys() == linears(model).keys()
    seen = dict.fromkeys(tokens, 0)
    for key, layer in linears(model).items():
        layer.register_forward_pre_hook(
            lambda m, args, key=key: seen.update({key: seen[key] + args[0][..., 0].numel()})
        )
    with torch.no_grad():
        for batch in x[:4]:
            model(batch)
    assert tokens == seen
    for layer in report.layers:
        assert bool(layer.note) == (not layer.tokens)
    assert report.measure == "relative output error"
    assert report.held_out["reference"] == 0
    assert 0 < report.held_out["calibrated"] < 0.5


@pytest.mark.parametrize("name", ["twice", "interleaved", "towers", "tuple"])
def test_the_gate_judges_the_models(name):
    model, x = plain(name)
    original, data_free = copy.deepcopy(model), copy.deepcopy(model)
    report = quiet(model, LiquidConfig("hessian", gate="off"), calibration=x[:4], held_out=x[4:])
    quiet(data_free, LiquidConfig())
    for kind, one in (("data-free", data_free), ("calibrated", model)):
        errors = []
        with torch.no_grad():
            for batch in x[4:]:
                ours, theirs = one(batch), original(batch)
                pairs = zip(ours.values(), theirs.values(), strict=True) if name == "towers" else [
                    (ours, theirs)
                ]  # fmt: skip
                errors.append([((a - b).norm() / b.norm()).item() for a, b in pairs])
        mean = torch.tensor(errors).mean().item()
        assert report.held_out[kind] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("name", ["interleaved", "towers"])
def test_moments_are_those_of_the_quantized_model(name, monkeypatch):
    """Of layers that are called once: what comes before them is quantized when they are."""
    seen, original = {}, driver.quantize_layers
    monkeypatch.setattr(
        driver,
        "quantize_layers",
        lambda w, c, m: seen.update(dict.fromkeys(w, m)) or original(w, c, m),
    )
    model, x = plain(name)
    quiet(model, LiquidConfig("hessian"), calibration=x)
    inputs = {key: [] for key in linears(model)}
    for key, layer in linears(model).items():
        layer.register_forward_pre_hook(
            lambda m, args, key=key: inputs[key].append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in x:
            model(batch)
    for key, parts in inputs.items():
        if not parts:
            assert key.startswith("unused")
            continue
        rows = driver.round_activation(torch.cat(parts)).double()
        expected = rows.T @ rows / len(rows)
        assert (seen[key].hessian - expected).norm() < 1e-2 * expected.norm(), key


def test_a_shared_layer_is_quantized_once():
    """In two blocks: the second one runs with what the first one has got."""
    net = Net(STRAIGHT)
    blocks = net.lists["0"]
    blocks[1].up = blocks[0].up
    x = [torch.randn(3, 5, 32) for _ in range(4)]
    expected = net(x[0])
    quiet(net, LiquidConfig("gptq"), calibration=x)
    assert net.lists["0"][1].up is net.lists["0"][0].up
    assert (net(x[0]) - expected).norm() < 0.3 * expected.norm()


def test_resume_notices_another_structure(tmp_path):
    """The same layers and data, called in another order."""
    _, x = plain("tensor")
    config = LiquidConfig("hessian")
    torch.manual_seed(0)
    quiet(Net(STRAIGHT), config, calibration=x, resume=tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"resume: .* another structure"):
        quiet(Net(STRAIGHT[::-1]), config, calibration=x, resume=tmp_path)


@pytest.mark.parametrize("name", ["towers", "twice", "whisper"])
def test_resume_gives_the_same_bits(name, tmp_path, monkeypatch):
    def fresh():
        return build(name, 4) if name in MODELS else plain(name)

    config = LiquidConfig("hessian", tune=2, gate="off")
    expected, data = fresh()
    quiet(expected, config, calibration=data)
    model, _ = fresh()
    run, count = driver._quantize_unit, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(driver, "_quantize_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, config, calibration=data, resume=tmp_path)
    quiet(model, config, calibration=data, resume=tmp_path)
    for key, value in expected.state_dict().items():
        reference.assert_same(model.state_dict()[key], value, key=key)


def test_opposite_orders_are_refused():
    class Either(Net):
        def forward(self, x, back=False):
            self.order = STRAIGHT[::-1] if back else STRAIGHT
            return super().forward(x)

    x = torch.randn(2, 5, 32)
    with pytest.raises(
        ValueError, match=r"calibration: expected batches that call .* in one order"
    ):
        quiet(Either(STRAIGHT), LiquidConfig("hessian"),
              calibration=[{"x": x}, {"x": x, "back": True}])  # fmt: skip
