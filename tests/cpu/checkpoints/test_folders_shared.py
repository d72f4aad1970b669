"""Folders that others use at the same time, and paths as users write them."""

import os
import threading
from contextlib import suppress

import pytest
import reference
import torch
from folders import MANIFEST, content, plain
from torch import nn

from liquidgemm import load_quantized, save_quantized
from liquidgemm.checkpoints import _manifest

WEIGHTS = "liquidgemm.safetensors"


def instance() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))


def test_two_writers_leave_a_checkpoint_of_one(tmp_path, monkeypatch):
    """The first one waits between its weights and its manifest until the other has got as far."""
    models = [plain(seed) for seed in (1, 2)]
    save_quantized(plain(0), tmp_path)
    replace, both = os.replace, threading.Barrier(2)

    def meeting(source, target):
        replace(source, target)
        if os.path.basename(target) == WEIGHTS and ".saving-" not in str(target):
            with suppress(threading.BrokenBarrierError):  # the other one has to wait outside
                both.wait(1)

    monkeypatch.setattr(os, "replace", meeting)
    threads = [threading.Thread(target=save_quantized, args=(m, tmp_path)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.n_waiting
    loaded = load_quantized(tmp_path, instance())
    x = torch.randn(3, 128)
    assert any(loaded(x).equal(model(x)) for model in models)
    assert content(tmp_path).keys() == {MANIFEST, WEIGHTS}


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Between its hash and its tensors, which are no longer those of the hash."""
    save_quantized(plain(0), tmp_path / "a")
    save_quantized(plain(1), tmp_path / "b")
    load = _manifest.load_file

    def late(path):
        os.replace(tmp_path / "b" / WEIGHTS, path)
        return load(path)

    monkeypatch.setattr(_manifest, "load_file", late)
    model = instance()
    with pytest.raises(ValueError, match="was replaced while it was read"):
        load_quantized(tmp_path / "a", model)
    assert type(model[0]) is nn.Linear


def test_a_link_to_weights_is_replaced_and_not_what_it_leads_to(tmp_path):
    """As in a copy of the hub's cache."""
    save_quantized(plain(0), tmp_path / "cache")
    there = content(tmp_path / "cache")
    (tmp_path / "out").mkdir()
    for name in there:
        (tmp_path / "out" / name).symlink_to(tmp_path / "cache" / name)
    save_quantized(plain(1), tmp_path / "out")
    assert content(tmp_path / "cache") == there
    x = torch.randn(3, 128)
    reference.assert_same(load_quantized(tmp_path / "out", instance())(x), plain(1)(x))


def test_the_home_directory_by_its_sign(tmp_path, monkeypatch):
    """No folder of the name ``~`` is made, which one would remove with what it stands for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_quantized(plain(0), "~/a model, ünnamed")
    assert os.listdir("home") == ["a model, ünnamed"]
    assert os.listdir() == ["home"]
    load_quantized("~/a model, ünnamed", instance())
    save_quantized(plain(0), "~nobody-of-this-name")
    assert sorted(os.listdir()) == ["home", "~nobody-of-this-name"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        save_quantized(plain(0), tmp_path / name)
    assert content(tmp_path) == {"file": b"mine"}


def test_a_manifest_that_says_two_things(tmp_path):
    save_quantized(plain(0), tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"weights":', '"weights": "x", "weights":'))
    with pytest.raises(ValueError, match="expected each key once, got 'weights' several times"):
        load_quantized(tmp_path, instance())
