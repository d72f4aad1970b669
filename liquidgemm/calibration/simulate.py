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
        self.factor: Tensor | None = None  # of the outputs, while it is being learned

    def forward(self, x: Tensor) -> Tensor:
        # Rounding is passed straight through, as `liquidgemm.linear` does.
        rounded = round_activation(x.detach())
        if torch.is_grad_enabled():
            rounded = x + (rounded - x).detach()
        bias = None if self.bias is None else self.bias.float()
        if self.factor is None:
            return F.linear(rounded.float(), self.weight, bias).to(x.dtype)
        y = F.linear(rounded.float(), self.weight) * self.factor
        return (y if bias is None else y + bias).to(x.dtype)

    def scale_rows(self, factors: Tensor) -> None:
        """Multiply the rows of the weight by ``factors [N]``: only sigma changes."""
        self.quantized = replace(self.quantized, scale=self.quantized.scale * factors)
        # Anew, as it will be when the layer is restored: not the old values multiplied.
        self.weight.copy_(dequantize_weight(self.quantized))

    def divide_outputs(self, factors: Tensor) -> None:
        """Divide outputs by ``factors [N]``: only sigma and the bias change."""
        self.scale_rows(1 / factors)
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
