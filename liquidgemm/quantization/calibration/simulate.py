"""Quantized layers as calibration needs them: differentiable, on any device."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.linear import LiquidLinear
from ...ops import _cpu
from ...weights.weight import QuantizedWeight, dequantize_weight
from .moments import round_activation


class SimulatedLinear(nn.Module):
    """A `LiquidLinear` whose product is a float matrix product of the dequantized operands.

    It differs from the kernel by the rounding of float32 sums alone. Where the exact path is
    faster, on a CPU with kernels of its own, and no gradient is asked for, it is that.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.register_buffer("weight", dequantize_weight(weight), persistent=False)
        self.register_buffer("bias", bias)
        self.factor: Tensor | None = None  # of the outputs, while it is being learned
        self._exact: LiquidLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not torch.is_grad_enabled() and self.factor is None:
            if self._exact is None and _cpu.is_fast():
                self._exact = self.to_layer()
            if self._exact is not None:
                return self._exact(x)
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
        self._exact = None
        # Anew, as it will be when the layer is restored: not the old values multiplied.
        self.weight.copy_(dequantize_weight(self.quantized))

    def divide_outputs(self, factors: Tensor) -> None:
        """Divide outputs by ``factors [N]``: only sigma and the bias change."""
        self.scale_rows(1 / factors)
        if self.bias is not None:
            self.bias.div_(factors)

    def to_layer(self) -> LiquidLinear:
        return LiquidLinear.from_quantized(self.quantized, self.bias)
