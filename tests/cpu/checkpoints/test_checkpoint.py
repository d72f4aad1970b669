"""save_quantized and load_quantized on plain modules."""

import json
from pathlib import Path

import pytest
import reference
import torch
from plain_models import (
    MANIFEST,
    WEIGHTS,
    Net,
    assert_same_state,
    edit_manifest,
    make,
    run,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import nn

import liquidgemm
from liquidgemm import LiquidConfig, LiquidLinear, load_quantized, save_quantized
from liquidgemm.checkpoints._manifest import sha256_of

# There and back.


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


def edit_weights(change):
    """Another state with a hash that fits: what only the checks of the content can notice."""

    def edit(directory):
        state = load_file(directory / WEIGHTS)
        change(state)
        save_file(state, directory / WEIGHTS)
        edit_manifest(sha256=sha256_of(directory / WEIGHTS))(directory)

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
    edit_manifest(sha256=sha256_of(directory / WEIGHTS))(directory)


def remove(name):
    return lambda directory: (directory / name).unlink()


def edit_layer(**changes):
    def edit(directory):
        layers = json.loads((directory / MANIFEST).read_text())["layers"]
        edit_manifest(layers=layers | {"pool": layers["pool"] | changes})(directory)

    return edit


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
        (edit_manifest(format_version=5), ValueError, "got 5: it was saved by a newer liquidgemm"),
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
        (
            edit_layer(in_features=96.0),
            ValueError,
            r"pool: expected .*: 96\.0.* as in .*, got .*: 96,",
        ),
        (edit_layer(bias=1), ValueError, "pool: expected .*'bias': 1.* as in .*'bias': True"),
        (edit_layer(group_size=64.0), ValueError, "pool: expected an integer for group_size in"),
        (
            edit_layer(augment=False),
            ValueError,
            "pool: expected an integer for augment .*got False",
        ),
        (edit_manifest(config={"digits": 3}), ValueError, r"got \['digits'\]"),
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
        "sha256": sha256_of(directory / WEIGHTS),
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
