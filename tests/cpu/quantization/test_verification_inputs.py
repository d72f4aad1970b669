"""What a model is run on to verify it: calibration data, cut short, or an input made up for it."""

import pytest
import torch
from structures import structures
from torch import nn

from liquidgemm.quantization.verification import Probe
from liquidgemm.quantization.verification.inputs import small_inputs

STRUCTURES = structures()


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (torch.zeros(9, 100, dtype=torch.long), {"": [2, 32]}),
        (torch.zeros(9, 100, 64), {"": [2, 100, 64]}),
        (
            {k: torch.ones(9, 100, dtype=torch.long) for k in ("input_ids", "attention_mask")},
            {"input_ids": [2, 32], "attention_mask": [2, 32]},
        ),
        (  # nothing says which of these tokens stand for which image
            {"input_ids": torch.ones(9, 100), "pixel_values": torch.zeros(9, 3, 8, 8)},
            {"input_ids": [2, 100], "pixel_values": [2, 3, 8, 8]},
        ),
        (
            {"input_ids": torch.ones(1, 100), "pixel_values": torch.zeros(70, 588)},
            {"input_ids": [1, 100], "pixel_values": [70, 588]},
        ),
    ],
)
def test_calibration_data_are_cut_where_that_is_safe(batch, shapes):
    ((_, (args, kwargs)),) = small_inputs(nn.Linear(64, 64), batch)
    found = {"": args[0]} if args else kwargs
    assert {key: list(x.shape) for key, x in found.items()} == shapes


@pytest.mark.parametrize("name", STRUCTURES)
def test_inputs_are_made_up_for_each_kind_of_model(name):
    probe = Probe(STRUCTURES[name].make(), [], None)
    assert probe.result.reason == ""
