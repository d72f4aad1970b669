"""Blocks that do more than to return something: what they write, share, keep, or are hooked to."""

import collections
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liquidgemm import LiquidConfig, quantize_

SIZE = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 96), nn.Linear(96, SIZE)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    """A chain of three blocks."""

    block = Block

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1].register_forward_hook(lambda module, args, out: 3 * out + 1)
        self.blocks[2].register_forward_pre_hook(lambda module, args: (args[0] / 4,))


class InPlace(Block):
    def forward(self, x):
        return x.add_(self.branch(x))


class WritesToInput(Net):
    """What blocks return is ignored."""

    block = InPlace

    def forward(self, x):
        x = 1 * x
        for block in self.blocks:
            block(x)
        return x


class WritesToOutput(Net):
    """The model writes to what blocks have given, and looks at it again later."""

    def forward(self, x):
        given = []
        for block in self.blocks:
            x = block(x)
            x += 1
            given.append(x)
            x = x * sum(g.mean() for g in given)
        return sum(given)


class WritesToBatch(Net):
    def forward(self, x):
        x += 1
        return super().forward(x)


class WithMemory(Block):
    def forward(self, x, memory):
        own = self.branch(x + memory["total"])
        memory["total"] = memory["total"] + own
        memory.setdefault("all", []).append(own)
        return x + own


class SharedDict(Net):
    block, kind = WithMemory, dict

    def forward(self, x):
        memory = self.kind(total=torch.zeros_like(x))
        for block in self.blocks:
            x = block(x, memory)
        return x + memory["total"] + memory["all"][0]


class SharedUserDict(SharedDict):
    kind = collections.UserDict


class Keeps(Block):
    def forward(self, x):
        self.kept = self.norm(x)
        return x + self.down(F.gelu(self.up(self.kept)))


class Attribute(Net):
    """The model reads what blocks have left in an attribute."""

    block = Keeps

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x) + (self.blocks[0].kept if index else 0)
        return x + self.blocks[1].kept


class Routed(Net):
    """Each block gets the tokens that a layer before has chosen for it."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(SIZE, 3)

    def forward(self, x):
        out, chosen = torch.zeros_like(x), self.route(x).argmax(-1)
        for index, block in enumerate(self.blocks):
            out[chosen == index] = block(x[chosen == index])
        return out


class TwoOutputs(Net):
    class block(Block):
        def forward(self, x):
            normed = self.norm(x)
            return x + self.down(F.gelu(self.up(normed))), normed

    def forward(self, x):
        total = 0
        for block in self.blocks:
            x, normed = block(x)
            total = total + normed
        return x + total


class Differing(Net):
    """Entries of one type that do not do the same."""

    class block(Block):
        alone = True

        def forward(self, x):
            return super().forward(x) + (0 if self.alone else self.norm(x))

    def __init__(self):
        super().__init__()
        self.blocks[2].alone = False


class NormOfAll(Net):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.norm = self.blocks[0].norm


class NormOutside(Net):
    def __init__(self):
        super().__init__()
        self.norm = self.blocks[0].norm

    def forward(self, x):
        return self.norm(super().forward(x))


def build(kind):
    torch.manual_seed(0)
    model = kind().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data[3::16] *= 8
    generator = torch.Generator().manual_seed(1)
    # Of several sizes, so that nothing of one batch passes for that of another.
    sizes = [(2, 24), (3, 16), (1, 40), (2, 20), (3, 25), (2, 31)]
    return model, [torch.randn(*size, SIZE, generator=generator) for size in sizes]


@torch.no_grad()
def off(model, original, batches):
    errors = []
    for x in batches:
        expected = original(x.clone())
        errors.append(((model(x.clone()) - expected).norm() / expected.norm()).item())
    return sum(errors) / len(errors)


def check(model, config):
    """The gate judges what is delivered, and calibration has helped; nothing is warned of."""
    (model, batches), original = model, copy.deepcopy(model[0])
    given = copy.deepcopy(batches)
    data_free = copy.deepcopy(model)
    quantize_(data_free, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize_(
            model, config, progress=False, calibration=batches[:4], held_out=batches[4:]
        )
    for before, after in zip(given, batches, strict=True):
        assert torch.equal(before, after)
    without, calibrated = (off(m, original, batches[4:]) for m in (data_free, model))
    assert report.held_out["data-free"] == pytest.approx(without, rel=1e-3)
    assert report.held_out["calibrated"] == pytest.approx(calibrated, rel=1e-3)
    assert calibrated < without
    return report


ASIDE = [Net, Hooked, WritesToInput, WritesToOutput, WritesToBatch, SharedDict, SharedUserDict]


@pytest.mark.parametrize("kind", [*ASIDE, Attribute])
def test_what_a_block_leaves_behind(kind):
    check(build(kind), LiquidConfig("gptq", gate="off"))


@pytest.mark.parametrize("kind", [Net, Hooked, SharedDict, Attribute, NormOfAll, NormOutside])
def test_tuned(kind):
    check(build(kind), LiquidConfig("gptq", gate="off", tune=10))


@pytest.mark.filterwarnings("ignore:.*tokens are too few")
@pytest.mark.parametrize("tune", [0, 2])
def test_blocks_that_the_data_chooses(tune):
    """Other tokens may reach them in the quantized model: no error, and no comparison of those."""
    model, batches = build(Routed)
    report = quantize_(
        model, LiquidConfig("hessian", tune=tune), progress=False, calibration=batches
    )
    assert all(layer.tokens for layer in report.layers)


class Experts(nn.Module):
    """Two of four experts for each token."""

    def __init__(self):
        super().__init__()
        self.gate, self.norm = nn.Linear(SIZE, 4, bias=False), nn.LayerNorm(SIZE)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(SIZE, 96), nn.SiLU(), nn.Linear(96, SIZE)) for _ in range(4)
        )

    def forward(self, x):
        flat = self.norm(x).flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, place = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return x + out.view_as(x)


def test_experts_that_get_other_tokens_are_no_fault():
    """As many as before may reach them, and be others."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(*[Experts() for _ in range(3)]).eval()
        batches = [torch.randn(2, 40, SIZE) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the quantized model does not do")
            quantize_(model, LiquidConfig(), progress=False, calibration=batches)


PAIR = {"norm": ["up"]}


def test_smoothing_where_it_changes_nothing():
    report = check(build(Net), LiquidConfig("gptq", smooth=PAIR, gate="off"))
    assert any(layer.alpha is not None for layer in report.layers)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwoOutputs, "what norm gives is used elsewhere too: .*, in blocks.0"),
        (Attribute, "what norm gives is used elsewhere too: .*, in blocks.0"),
        (Differing, "what norm gives is used elsewhere too: .*, in blocks.2"),
        (NormOfAll, "norm.bias is used outside of the block too, in blocks.0"),
        (NormOutside, "norm.bias is used outside of the block too, in blocks.0"),
    ],
)
def test_smoothing_is_refused_where_it_would_change_another_part(kind, message):
    model, batches = build(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"smooth: norm into up: {message}"):
        quantize_(model, LiquidConfig(smooth=PAIR), progress=False, calibration=batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_error_in_a_block_names_the_batch():
    """The float model is run once for each kind of batch; others fail as their turn comes."""
    model, batches = build(Net)
    wrong = [*batches, torch.randn(2, 24, SIZE // 2)]
    config = LiquidConfig("hessian")
    with pytest.raises(ValueError, match=r"calibration: batch 6: expected what Net.forward\(x\)"):
        quantize_(model, config, progress=False, calibration=wrong)
    with pytest.raises(ValueError, match=r"held_out: batch 6: expected what Net.forward\(x\)"):
        quantize_(model, config, progress=False, calibration=batches, held_out=wrong)
    assert type(model.blocks[0].up) is nn.Linear


def test_resume_notices_other_layers(tmp_path):
    """Of the same blocks: with another filter_fn or skip."""
    model, batches = build(Net)
    for name, first, second in (("more", "down", ""), ("fewer", "", "down")):
        options = {"progress": False, "calibration": batches, "resume": tmp_path / name}
        config = LiquidConfig("hessian")
        quantize_(
            copy.deepcopy(model), config, lambda n, _, x=first: not x or x not in n, **options
        )
        with pytest.raises(ValueError, match=r"resume: .* another structure"):
            quantize_(model, config, lambda n, _, x=second: not x or x not in n, **options)


@pytest.mark.parametrize("config", [{"keep": ("upp",)}, {"augment": {"upp": 64}}])
def test_patterns_that_match_nothing_are_warned_of(config):
    argument = next(iter(config))
    with pytest.warns(UserWarning, match=f"{argument}: 'upp' matches none"):
        quantize_(build(Net)[0], LiquidConfig(**config), progress=False)


def test_autocast_changes_nothing():
    results = []
    for enabled in (False, True):
        model, batches = build(Net)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_(model, LiquidConfig("gptq"), progress=False, calibration=batches)
        results.append(model.state_dict())
    plain, cast = results
    assert all(torch.equal(value, cast[key]) for key, value in plain.items())


class Reader(Net):
    """Computes with weights in a way that its source does not show."""

    def forward(self, x):
        for block in self.blocks:
            weights = [layer.weight for layer in (block.up, block.down)]
            x = x + F.linear(F.gelu(F.linear(block.norm(x), weights[0])), weights[1])
        return x + self.blocks[0](x)


class ReaderBesides(Reader):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.head(super().forward(x))


def test_a_dry_run_knows_readers():
    """What would stay in floats since it is read stays there in a dry run, too."""
    model, batches = build(ReaderBesides)
    options = {"progress": False, "calibration": batches}
    dry = quantize_(model, LiquidConfig("hessian"), dry_run=True, **options)
    report = quantize_(model, LiquidConfig("hessian"), **options)
    assert dry.quantized == report.quantized == ("head",)
    assert dry.skipped == report.skipped


def test_verification_leaves_no_hooks():
    model, batches = build(Net)
    quantize_(model, LiquidConfig("hessian"), progress=False, calibration=batches)
    assert not torch.nn.modules.module._has_any_global_hook()
