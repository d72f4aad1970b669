"""Layers whose weight other code reads stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liquidgemm import quantize_


class Reader(nn.Module):
    """A layer whose weight this module uses, or asks about, as ``use`` says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.near = nn.ModuleDict({"proj": nn.Linear(64, 64)})
        self.other = nn.Linear(64, 64)

    def forward(self, x):
        return self.other(self.near["proj"](x))


class Values(Reader):
    def forward(self, x):
        return F.linear(x, self.other.weight) + self.near["proj"](x)


class Alias(Reader):
    def forward(self, x):
        layer = self.other
        return x @ layer.weight.T


class GetAttribute(Reader):
    def forward(self, x):
        return x @ getattr(self.other, "weight").T  # noqa: B009


class Writes(Reader):
    def forward(self, x):
        self.other.weight.div_(2)
        return self.other(x)


class Inherits(Values):
    pass


class InHelper(Reader):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return x @ self.other.weight


class OnlyAsks(Reader):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.other.weight)

    def _init_weights(self):
        self.other.weight.data.zero_()

    def forward(self, x):
        if isinstance(self.other.weight, torch.Tensor) and x.dtype != self.other.weight.dtype:
            x = x.to(self.other.weight.dtype)
        assert self.other.weight is not None
        return self.other(x.to(self.other.weight.device)).view(-1, self.other.weight.shape[0])


class SwitchedOff(Reader):
    """As for tensor parallelism in some models, which a setting switches on."""

    slices = 1

    def forward(self, x):
        if self.slices > 1 and x.dim() > 1:
            return x @ self.other.weight[: self.slices]
        return self.near["proj"](self.other(x))


class SwitchedOn(SwitchedOff):
    slices = 2


class Overrides(Values):
    def forward(self, x):
        return self.other(x)


@pytest.mark.parametrize("kind", [Reader, OnlyAsks, Overrides, SwitchedOff])
def test_code_that_asks_only_what_a_weight_is(kind):
    assert quantize_(kind(), progress=False).quantized == ("near.proj", "other")


@pytest.mark.parametrize(
    "kind", [Values, Alias, GetAttribute, Writes, Inherits, InHelper, SwitchedOn]
)
def test_layers_whose_weight_is_read_are_left_alone(kind):
    report = quantize_(kind(), progress=False)
    assert report.quantized == ("near.proj",)
    assert report.skipped["other"].startswith("its weight is read by ")
    assert kind.__mro__[kind in (Inherits, SwitchedOn)].__name__ in report.skipped["other"]
