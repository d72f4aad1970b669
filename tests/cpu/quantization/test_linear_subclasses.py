"""Subclasses of nn.Linear: those that compute the same are linear layers, others stay."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from liquidgemm import LiquidLinear, quantize_


class Spelled(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Marked(nn.Linear):
    pass


class WithState(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = 1.0


class WithMethod(nn.Linear):
    def weights_for_attention(self):
        return self.weight


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x if self.training else x / 2)


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, -2))


class Needy(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("kind", [Spelled, Marked])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_the_same_is_a_linear_layer(kind, bias):
    torch.manual_seed(0)
    model = nn.Sequential(kind(64, 128, bias=bias), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(5, 64)
    expected = model(x)
    report = quantize_(model, progress=False)
    assert report.quantized == ("0", "2")
    assert (model(x) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("kind", [WithState, WithMethod, Halved, Flat, Needy])
def test_a_subclass_that_may_compute_something_else_is_left_alone(kind):
    model = nn.ModuleDict({"it": kind(64, 64), "other": nn.Linear(64, 64)})
    report = quantize_(model, progress=False)
    assert report.skipped["it"] == f"not nn.Linear but {kind.__name__}"
    with (
        pytest.raises(TypeError, match="may be more than the product")
        if (kind.forward is not nn.Linear.forward)
        else nullcontext()
    ):
        LiquidLinear.from_linear(kind(64, 64))


def test_falcon():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.FalconForCausalLM(config).eval()
    names = quantize_(model, progress=False).quantized
    assert {name.rpartition(".")[2] for name in names} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
