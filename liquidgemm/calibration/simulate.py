"""Quantized layers in plain floating point: what calibration and evaluation on a CPU run."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modules import paths_of_modules, replace_module
from ..linear import LiquidLinear
from ..weight import QuantizedWeight, dequantize_weight
from .moments import round_activation


class SimulatedLinear(nn.Module):
    """A `LiquidLinear` whose product is a float matrix product of the dequantized operands.

    It differs from the kernel by the rounding of float32 sums alone, and is much faster than the
    exact path on a CPU.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.register_buffer("weight", dequantize_weight(weight), persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(round_activation(x).float(), self.weight, bias).to(x.dtype)

    def divide_rows(self, factors: Tensor) -> None:
        """Divide outputs by ``factors [N]``: only sigma and the bias change."""
        self.quantized = replace(self.quantized, scale=self.quantized.scale / factors)
        self.weight.div_(factors.unsqueeze(1))
        if self.bias is not None:
            self.bias.div_(factors)

    def to_layer(self) -> LiquidLinear:
        return LiquidLinear.from_quantized(self.quantized, self.bias)


@torch.no_grad()
def simulate_(model: nn.Module) -> nn.Module:
    """Replace every `LiquidLinear` of a model by a `SimulatedLinear`, in place."""
    for module, paths in paths_of_modules(model).items():
        if isinstance(module, LiquidLinear):
            simulated = SimulatedLinear(module.quantized_weight(), module.bias)
            for path in paths:
                replace_module(model, path, simulated)
    return model
