"""save_quantized, save_pretrained, load_quantized and from_pretrained, in one folder."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import reference
import tiny_llama
import torch
from folders import MANIFEST, WEIGHTS, llama, seed_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from liquidgemm import load_quantized, save_quantized


def save_whole(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def save_shards(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="50KB")


SAVERS = {"save_quantized": save_quantized, "whole": save_whole, "shards": save_shards}


def into_an_instance(folder: Path) -> nn.Module:
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config  # as of a model that has never been saved
    return load_quantized(folder, LlamaForCausalLM._from_config(config, dtype=torch.bfloat16))


READERS = {
    "load_quantized": load_quantized,
    "into an instance": into_an_instance,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("second", SAVERS)
@pytest.mark.parametrize("first", ["nothing", *SAVERS])
def test_every_reader_gets_what_was_written_last(tmp_path, first, second, reader):
    """CHECKLIST 26: whatever wrote to the folder before."""
    out = tmp_path / "out"
    model = llama(tmp_path, 1)
    if first != "nothing":
        SAVERS[first](model, out)
    model.model.norm.weight.data.fill_(2)
    SAVERS[second](model, out)
    (out / "tokenizer.json").write_text("{}")
    loaded = READERS[reader](out)
    assert seed_of(loaded) == 2
    assert tiny_llama.liquid_layers(loaded) == tiny_llama.liquid_layers(model)
    with torch.no_grad():
        reference.assert_same(loaded(tiny_llama.IDS).logits, model(tiny_llama.IDS).logits)


def test_weights_that_were_copied_over_a_checkpoint(tmp_path):
    """CHECKLIST 26: they are told from damaged ones no better than by an error that says how."""
    save_quantized(llama(tmp_path, 1), tmp_path / "out")
    llama(tmp_path, 2).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").replace(tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError, match="if save_pretrained wrote it since, remove liquid"):
        load_quantized(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    assert seed_of(load_quantized(tmp_path / "out")) == 2


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def float_weights(folder: Path) -> None:
    state = LlamaForCausalLM.from_pretrained(folder.parent / "float").state_dict()
    save_file({k: v.clone() for k, v in state.items()}, folder / WEIGHTS, {"format": "pt"})


def lose_a_norm(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["model.norm.weight"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def lose(name: str):
    return lambda folder: next(iter(sorted(folder.glob(name)))).unlink()


@pytest.mark.parametrize("reader", ["load_quantized", "into an instance"])
@pytest.mark.parametrize(
    ("writer", "damage", "error", "message"),
    [
        ("save_quantized", lambda f: flip(f / WEIGHTS, -5), ValueError, "damaged"),
        ("save_quantized", lambda f: flip(f / WEIGHTS, 20), ValueError, "damaged"),
        ("save_quantized", float_weights, ValueError, "a float model, saved since"),
        ("save_quantized", lose(WEIGHTS), FileNotFoundError, "no such file"),
        ("whole", lose(WEIGHTS), FileNotFoundError, "holds no model.safetensors"),
        ("whole", lose_a_norm, ValueError, "missing keys: model.norm.weight"),
        ("whole", lambda f: (f / WEIGHTS).write_bytes(b"GGUF" * 99), ValueError, "out: "),
        ("shards", lose("model-*-of-*"), FileNotFoundError, "missing, though .*index.json names"),
        ("shards", lose("config.json"), FileNotFoundError, "expected a folder from save_quantized"),
    ],
)
def test_what_is_damaged_or_gone_is_no_newer_checkpoint(
    tmp_path, writer, damage, error, message, reader
):
    """CHECKLIST 19, 26."""
    SAVERS[writer](llama(tmp_path), tmp_path / "out")
    damage(tmp_path / "out")
    model = None if reader == "load_quantized" else llama(tmp_path, 3)
    with pytest.raises(error, match=message):
        load_quantized(tmp_path / "out", model)
    assert model is None or seed_of(model) == 3


def test_a_manifest_of_files_that_are_gone(tmp_path):
    """CHECKLIST 26: shards took their place."""
    save_quantized(llama(tmp_path, 1), tmp_path / "out")
    manifest = (tmp_path / "out" / MANIFEST).read_bytes()
    save_shards(llama(tmp_path, 2), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    (tmp_path / "out" / MANIFEST).write_bytes(manifest)
    assert seed_of(load_quantized(tmp_path / "out")) == 2


def test_two_checkpoints_in_a_folder_are_no_guess(tmp_path):
    """CHECKLIST 26: one file and shards, as copying leaves them."""
    save_quantized(llama(tmp_path, 1), tmp_path / "out")
    save_shards(llama(tmp_path, 2), tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "out", dirs_exist_ok=True)
    for reader in READERS.values():
        with pytest.raises(ValueError, match="holds two checkpoints"):
            reader(tmp_path / "out")


def test_variants(tmp_path):
    """CHECKLIST 26: a single one is the model; beside another checkpoint it is another."""
    model = llama(tmp_path, 1)
    model.save_pretrained(tmp_path / "out", variant="a")
    assert seed_of(load_quantized(tmp_path / "out")) == 1
    model.model.norm.weight.data.fill_(2)
    save_quantized(model, tmp_path / "out")
    assert seed_of(load_quantized(tmp_path / "out")) == 2
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="a")
    assert seed_of(other) == 1
    model.model.norm.weight.data.fill_(3)
    model.save_pretrained(tmp_path / "out", variant="b")
    assert seed_of(load_quantized(tmp_path / "out")) == 2
    for name in (MANIFEST, WEIGHTS):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ValueError, match=r"variants a, b: .*variant="):
        load_quantized(tmp_path / "out")


def test_a_loaded_model_of_another_kind_is_not_filled_up(tmp_path):
    """CHECKLIST 19: a new head is no part of the checkpoint."""
    llama(tmp_path).save_pretrained(tmp_path / "out")
    config = LlamaConfig.from_pretrained(tmp_path / "float")
    from transformers import LlamaForSequenceClassification

    with pytest.raises(ValueError, match=r"missing keys: score\.weight"):
        load_quantized(tmp_path / "out", LlamaForSequenceClassification(config))


def test_copies_of_a_model_save_themselves(tmp_path):
    """What is attached to a model for save_pretrained is no other model's."""
    model = llama(tmp_path, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.model.norm.weight.data.fill_(2)
        other.save_pretrained(tmp_path / "out")
        assert seed_of(load_quantized(tmp_path / "out")) == 2
