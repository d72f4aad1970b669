"""A share of the damaged files that `make stress` makes more than 10 000 of."""

import json
import random

import mutations
import pytest
import reference
import torch
from safetensors.torch import save

from liquidgemm import load_quantized


def test_damaged_checkpoints(tmp_path) -> None:
    """CHECKLIST 17, 19: refused with a ValueError and the model unchanged, or right to the bit."""
    assert mutations.check_checkpoints(tmp_path, 300, seed=0) > 0


def test_damaged_configs() -> None:
    """CHECKLIST 17, 19."""
    assert mutations.check_configs(1000, seed=0) > 0


def test_damaged_states() -> None:
    """CHECKLIST 17, 19."""
    assert mutations.check_states(200, seed=0) > 0


def test_a_good_checkpoint_is_accepted(tmp_path) -> None:
    """CHECKLIST 19: so that the judge above accepts what it should."""
    checkpoint = mutations.Checkpoint(tmp_path)
    assert checkpoint.check()
    expected = mutations.snapshot(mutations.quantized_net(0))

    loaded = load_quantized(tmp_path, checkpoint.target)
    mutations.assert_equal_states(mutations.snapshot(loaded), expected)


def test_the_judge_notices_a_wrong_load(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CHECKLIST 19: a loader that changes a bit, or the model before it refuses."""
    checkpoint = mutations.Checkpoint(tmp_path)

    def changes_a_bit(folder, model):
        load_quantized(folder, model)
        model.norm.bias.data[2] = -0.0

    monkeypatch.setattr(mutations, "load_quantized", changes_a_bit)
    with pytest.raises(AssertionError, match=r"norm\.bias"):
        checkpoint.check()

    def refuses_too_late(folder, model):
        model.step += 1
        raise ValueError("late")

    monkeypatch.setattr(mutations, "load_quantized", refuses_too_late)
    with pytest.raises(AssertionError):
        checkpoint.check()


def test_our_own_reader_of_safetensors() -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3),
        "b": torch.ones(0, 4),
        "c": torch.tensor(2.5).half(),
    }
    read = mutations.read_safetensors(save(tensors, {"format": "pt"}))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        reference.assert_same(read[name], tensor)


def test_mutations_of_json_leave_the_original_alone() -> None:
    value = {"a": [1, {"b": 2}], "c": None}
    text = json.dumps(value)
    changed = sum(mutations.mutate_json(value, random.Random(i)) != value for i in range(100))
    assert json.dumps(value) == text
    assert changed > 90
