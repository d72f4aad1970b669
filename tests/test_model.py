"""quantize_, save_quantized and load_quantized on plain modules and on transformers models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import liquidgemm
from liquidgemm import LiquidConfig, LiquidLinear, load_quantized, quantize_, save_quantized

MANIFEST, WEIGHTS = "liquidgemm.json", "liquidgemm.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(96)
        self.up = nn.Linear(96, 200)
        self.down = nn.Linear(200, 96, bias=False)
        self.register_buffer("step", torch.tensor(3))

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding tied to the head, two blocks and one of them used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])
        self.pool = nn.Linear(96, 96)
        self.lm_head = nn.Linear(96, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.pool(x))


TOKENS = torch.arange(12).view(2, 6)
QUANTIZED = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "pool"]


def make(seed=0, quantized=True):
    torch.manual_seed(seed)
    net = Net().eval()
    if quantized:
        quantize_(net, progress=False)
    return net


@torch.no_grad()
def run(net):
    return net(TOKENS)


def snapshot(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_same_state(net, expected):
    state = net.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        reference.assert_same(state[key], value, key=key)


# LiquidConfig.


def test_config_json_round_trip():
    for config in (LiquidConfig(), LiquidConfig("rtn", 128, ("a", "b.*"))):
        assert LiquidConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "magic"}', "method: .*'magic'"),
        ('{"group_size": 32}', "group_size: .*32"),
        ('{"skip": "lm_head"}', "skip: .*'lm_head'"),
        ('{"skip": [1]}', "skip: "),
        ('{"bits": 3}', r"expected fields among .*got \['bits'\]"),
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
        pass

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


# save_quantized and load_quantized, plain modules.


@pytest.fixture
def saved(tmp_path):
    net = make()
    save_quantized(net, tmp_path / "model")
    return net, tmp_path / "model"


@pytest.mark.parametrize("kind", ["float", "quantized", "meta"])
def test_round_trip(saved, kind):
    """CHECKLIST 19: the same bits, into an instance of any state."""
    net, directory = saved
    assert sorted(file.name for file in directory.iterdir()) == [MANIFEST, WEIGHTS]
    if kind == "meta":
        with torch.device("meta"):
            other = Net().eval()
    else:
        other = make(seed=1, quantized=kind == "quantized")
    assert load_quantized(directory, model=other) is other
    assert_same_state(other, snapshot(net))
    reference.assert_same(run(other), run(net))
    assert other.blocks[2] is other.blocks[0]
    assert other.liquid_config == net.liquid_config == LiquidConfig()
    if kind != "meta":
        assert other.lm_head.weight is other.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_in_half_precision(tmp_path, dtype):
    net = make().to(dtype)
    save_quantized(net, tmp_path)
    other = load_quantized(tmp_path, model=make(seed=1, quantized=False).to(dtype))
    assert_same_state(other, snapshot(net))
    reference.assert_same(run(other), run(net))


def test_tied_tensors_are_stored_once(saved):
    _, directory = saved
    stored = load_file(directory / WEIGHTS)
    assert "embed.weight" in stored
    assert "lm_head.weight" not in stored


def test_views_and_strides_are_stored(tmp_path):
    net = make()
    table = torch.randn(96, 100)
    net.embed.weight.data = table.T[:50]  # a strided view of a larger table
    net.register_buffer("slice", torch.arange(10.0)[3:5])
    save_quantized(net, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    reference.assert_same(state["embed.weight"], table.T[:50].contiguous())
    reference.assert_same(state["slice"], torch.tensor([3.0, 4.0]))


def test_saving_again_replaces_the_checkpoint(saved):
    _, directory = saved
    other = make(seed=5)
    save_quantized(other, directory)
    assert sorted(file.name for file in directory.iterdir()) == [MANIFEST, WEIGHTS]
    assert_same_state(load_quantized(directory, model=make()), snapshot(other))


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    """CHECKLIST 19: files are replaced when complete, and nothing is left behind."""
    net, directory = saved

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(liquidgemm._files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_quantized(make(seed=5), directory)
    assert sorted(file.name for file in directory.iterdir()) == [MANIFEST, WEIGHTS]
    assert_same_state(load_quantized(directory, model=make(seed=1)), snapshot(net))


def test_an_interrupted_save_is_noticed(saved):
    """CHECKLIST 19: new weights beside an old manifest are not taken for either checkpoint."""
    _, directory = saved
    manifest = (directory / MANIFEST).read_bytes()
    save_quantized(make(seed=5), directory)
    (directory / MANIFEST).write_bytes(manifest)
    with pytest.raises(ValueError, match=f"not the file that {MANIFEST} was saved with"):
        load_quantized(directory, model=make())


@pytest.mark.parametrize(
    "model", [Net(), LiquidLinear(64, 64), nn.Linear(4, 4)], ids=lambda m: type(m).__name__
)
def test_saving_nothing_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="expected a module that contains quantized layers"):
        save_quantized(model, tmp_path)


# Refusals. Each is an edit of a good checkpoint and the message that it must give.


def edit_manifest(**changes):
    def edit(directory):
        manifest = json.loads((directory / MANIFEST).read_text())
        for key, value in changes.items():
            manifest[key] = value
            if value is None:
                del manifest[key]
        (directory / MANIFEST).write_text(json.dumps(manifest))

    return edit


def edit_weights(change):
    """Another state with a hash that fits: what only the checks of the content can notice."""

    def edit(directory):
        state = load_file(directory / WEIGHTS)
        change(state)
        save_file(state, directory / WEIGHTS)
        edit_manifest(sha256=liquidgemm.checkpoint._sha256(directory / WEIGHTS))(directory)

    return edit


def truncate(name, size):
    def edit(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[:size])

    return edit


def flip_a_bit(directory):
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (directory / WEIGHTS).write_bytes(data)


def not_safetensors(directory):
    (directory / WEIGHTS).write_bytes(b"GGUF" * 100)
    edit_manifest(sha256=liquidgemm.checkpoint._sha256(directory / WEIGHTS))(directory)


def remove(name):
    return lambda directory: (directory / name).unlink()


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (remove(MANIFEST), FileNotFoundError, f"{MANIFEST}: no such file"),
        (remove(WEIGHTS), FileNotFoundError, f"{WEIGHTS}: no such file"),
        (truncate(MANIFEST, 100), ValueError, f"{MANIFEST}: truncated or damaged"),
        (truncate(WEIGHTS, -1), ValueError, f"{WEIGHTS}: truncated, damaged"),
        (truncate(WEIGHTS, 0), ValueError, f"{WEIGHTS}: truncated, damaged"),
        (flip_a_bit, ValueError, f"{WEIGHTS}: truncated, damaged"),
        (not_safetensors, ValueError, f"{WEIGHTS}: expected a safetensors file"),
        (edit_manifest(format="gptq"), ValueError, "expected a liquidgemm checkpoint"),
        (edit_manifest(format_version=3), ValueError, "got 3: it was saved by a newer liquidgemm"),
        (edit_manifest(format_version="1"), ValueError, "expected a format version, got '1'"),
        (edit_manifest(layers=None), ValueError, "damaged: layers is 'missing'"),
        (edit_manifest(aliases=[]), ValueError, r"damaged: aliases is \[\]"),
        (edit_manifest(format_version=True), ValueError, "expected a format version, got True"),
        (edit_manifest(aliases={"lm_head.weight": [3]}), ValueError, r"damaged: .*same as \[3\]"),
        (
            edit_manifest(aliases={"pool.bias": "embed.weight"}),
            ValueError,
            "pool.bias: in .* though it is the same tensor as embed.weight",
        ),
        (
            edit_weights(lambda s: s.update({"pool.bias": torch.zeros(96, dtype=torch.int32)})),
            ValueError,
            r"pool.bias: expected dtype torch.float32 .*got torch.int32",
        ),
        (edit_manifest(layers={"pool": 3}), ValueError, "pool: expected 3 as in"),
        (edit_manifest(config={"bits": 3}), ValueError, r"got \['bits'\]"),
        (
            edit_weights(lambda s: s.pop("pool.qscale")),
            ValueError,
            "pool: qscale missing",
        ),
        (
            edit_weights(lambda s: s.pop("blocks.1.norm.weight")),
            ValueError,
            "blocks.1.norm.weight: in the model, but missing",
        ),
        (
            edit_weights(lambda s: s.pop("embed.weight")),
            ValueError,
            "embed.weight: missing in .*lm_head.weight is the same tensor",
        ),
        (
            edit_weights(lambda s: s.update(extra=torch.zeros(1))),
            ValueError,
            "extra: in .*but not in the model",
        ),
        (
            edit_weights(lambda s: s.update({"embed.weight": torch.zeros(51, 96)})),
            ValueError,
            r"embed.weight: expected shape \[50, 96\].*\[51, 96\]",
        ),
        (
            edit_weights(lambda s: s["pool.qscale"].fill_(255)),
            ValueError,
            "pool.qscale.*255",
        ),
        (
            edit_weights(lambda s: s["pool.scale"].fill_(torch.nan)),
            ValueError,
            "pool.scale: expected finite",
        ),
        (
            edit_weights(lambda s: s.update({"pool.bias": torch.zeros(95)})),
            ValueError,
            r"pool.bias: expected shape \[96\].*\[95\]",
        ),
    ],
)
@pytest.mark.parametrize("quantized", [True, False])
def test_bad_checkpoints_are_refused(saved, edit, error, message, quantized):
    """CHECKLIST 19: truncated, foreign, newer or damaged; the model stays as it was."""
    _, directory = saved
    edit(directory)
    other = make(seed=7, quantized=quantized)
    before, modules = snapshot(other), list(other.modules())
    with pytest.raises(error, match=message):
        load_quantized(directory, model=other)
    assert list(other.modules()) == modules
    assert_same_state(other, before)


def test_a_checkpoint_of_another_architecture_is_refused(saved):
    """CHECKLIST 19."""
    _, directory = saved
    other = make(quantized=False)
    other.blocks[1].up = nn.Linear(96, 201)
    with pytest.raises(ValueError, match=r"blocks.1.up: expected .*200.*got .*201"):
        load_quantized(directory, model=other)
    other.blocks[1].up = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match=r"blocks.1.up: expected a linear layer.*got Conv1d"):
        load_quantized(directory, model=other)
    del other.blocks[1].up
    with pytest.raises(ValueError, match=r"blocks.1.up: expected a linear layer.*got nothing"):
        load_quantized(directory, model=other)


def test_a_plain_module_needs_an_instance(saved):
    _, directory = saved
    with pytest.raises(ValueError, match="not a transformers model: pass an instance as model="):
        load_quantized(directory)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder from save_quantized"):
        load_quantized(tmp_path / "nowhere", model=make())


def write_version_1(directory):
    """CHECKLIST 19: a checkpoint of format version 1, typed out by hand."""
    q = [[(row + 3 * column) % 16 for column in range(64)] for row in range(3)]
    state = {
        "0.qweight": torch.tensor([[r[2 * j] | r[2 * j + 1] << 4 for j in range(32)] for r in q]),
        "0.qscale": torch.tensor([[1], [8], [17]]),
        "0.qoffset": torch.tensor([[240], [128], [0]]),
    }
    state = {key: value.byte() for key, value in state.items()}
    state["0.scale"] = torch.tensor([1.0, 0.5, 2.0])
    state["1.weight"] = torch.tensor([1.0, 2.0, 3.0])
    state["1.bias"] = torch.zeros(3)
    save_file(state, directory / WEIGHTS)
    manifest = {
        "format": "liquidgemm",
        "format_version": 1,
        "config": {"method": "search", "group_size": 64, "skip": ["lm_head"]},
        "transformers_class": None,
        "layers": {"0": {"in_features": 64, "out_features": 3, "bias": False}},
        "aliases": {},
        "sha256": liquidgemm.checkpoint._sha256(directory / WEIGHTS),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest))
    parameters = zip(q, (1, 8, 17), (240, 128, 0), (1.0, 0.5, 2.0), strict=True)
    return torch.tensor([[x * (v * s + a - 128) for v in row] for row, s, a, x in parameters])


def test_format_version_1_stays_readable(tmp_path):
    """CHECKLIST 19."""
    expected = write_version_1(tmp_path)
    model = nn.Sequential(nn.Linear(64, 3, bias=False), nn.LayerNorm(3))
    load_quantized(tmp_path, model=model)
    reference.assert_same(model[0].dequantize(), expected)
    assert model[1].weight.tolist() == [1, 2, 3]


# transformers.


def make_llama(dtype=torch.float32, seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.max_new_tokens = 7
    return model


FRESH = """
import sys, torch, liquidgemm
model = liquidgemm.load_quantized(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(12).view(2, 6)).logits
assert torch.equal(logits, torch.load(sys.argv[2])), "other logits"
print("same")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_round_trip(tmp_path, dtype):
    """CHECKLIST 19: rebuilt from the folder alone, here and in a fresh process, with equal bits."""
    model = make_llama(dtype)
    report = quantize_(model, progress=False)
    assert len(report.quantized) == 14
    assert report.skipped["lm_head"] == "matches the pattern 'lm_head'"
    # How the float weights had been stored is not how these are.
    model.config.quantization_config = {"quant_method": "gguf"}
    save_quantized(model, tmp_path / "model")
    stored = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "liquidgemm"
    other = load_quantized(tmp_path / "model")
    assert type(other) is type(model)
    assert not other.training
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.generation_config.max_new_tokens == 7
    assert_same_state(other, snapshot(model))
    with torch.no_grad():
        logits = model(TOKENS).logits
        reference.assert_same(other(TOKENS).logits, logits)
        prompt = TOKENS[:1]
        reference.assert_same(
            other.generate(prompt, do_sample=False), model.generate(prompt, do_sample=False)
        )
    torch.save(logits, tmp_path / "logits.pt")
    result = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "model", tmp_path / "logits.pt"],
        cwd=Path(liquidgemm.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "same", result.stdout + result.stderr


def test_loading_into_a_transformers_instance(tmp_path):
    expected = make_llama()
    quantize_(expected, progress=False)
    save_quantized(expected, tmp_path)
    other = load_quantized(tmp_path, model=make_llama(seed=1))
    assert_same_state(other, snapshot(expected))


@pytest.mark.parametrize("name", ["NoSuchModel", "AutoConfig", "logging"])
def test_an_unknown_transformers_class_is_refused(tmp_path, name):
    model = make_llama()
    quantize_(model, progress=False)
    save_quantized(model, tmp_path)
    edit_manifest(transformers_class=name)(tmp_path)
    with pytest.raises(ValueError, match=f"no model {name}: pass an instance"):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, FileNotFoundError),
        ("", ValueError),
        ("{", ValueError),
        ("[]", ValueError),
        ('{"model_type": "llama", "hidden_size": "many"}', ValueError),
        ('{"model_type": "llama", "hidden_act": "none"}', ValueError),
    ],
)
def test_a_damaged_transformers_config_is_refused(tmp_path, text, error):
    """CHECKLIST 19."""
    model = make_llama()
    quantize_(model, progress=False)
    save_quantized(model, tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=r"config\.json: "):
        load_quantized(tmp_path)
