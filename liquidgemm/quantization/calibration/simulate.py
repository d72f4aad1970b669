"""Quantized layers as calibration needs them: differentiable, on any device."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.linear import LiquidLinear
from ...ops import _cpu, quantize_activation
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
        self.original: Tensor | None = None  # float32 [N, K], if the codes are to be learned
        # While it is tuned: the weight in units of sigma, and a factor of sigma.
        self.learned: tuple[Tensor, Tensor] | None = None
        self._exact: LiquidLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.learned is not None:
            units, factor = self.learned
            y = _Product.apply(x, units, self.quantized.scale * factor)
            return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
        if x.is_cpu and not torch.is_grad_enabled():
            if self._exact is None and _cpu.is_fast():
                self._exact = self.to_layer()
            if self._exact is not None:
                return self._exact(x)
        # Rounding is passed straight through, as `liquidgemm.linear` does.
        rounded = round_activation(x.detach())
        if torch.is_grad_enabled():
            rounded = x + (rounded - x).detach()
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rounded.float(), self.weight, bias).to(x.dtype)

    def scale_rows(self, factors: Tensor) -> None:
        """Multiply the rows of the weight by ``factors [N]``: only sigma changes."""
        if self.original is not None:
            self.original = self.original * factors.unsqueeze(1)
        # Anew, as it will be when the layer is restored: not the old values multiplied.
        self.replace_weight(replace(self.quantized, scale=self.quantized.scale * factors))

    def replace_weight(self, quantized: QuantizedWeight) -> None:
        """Take another weight of the same shape."""
        self.quantized = quantized
        self._exact = None
        self.weight.copy_(dequantize_weight(quantized))

    def divide_outputs(self, factors: Tensor) -> None:
        """Divide outputs by ``factors [N]``: only sigma and the bias change."""
        self.scale_rows(1 / factors)
        if self.bias is not None:
            self.bias.div_(factors)

    def to_layer(self) -> LiquidLinear:
        return LiquidLinear.from_quantized(self.quantized, self.bias)


class _Product(torch.autograd.Function):
    """``y = alpha (x8 v) sigma``, differentiable in v and sigma, and straight through x's rounding.

    The operands are integers of at most 8 bits, so that v may be bfloat16: only the products' sums
    and the gradients are rounded to it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        x8, alpha = quantize_activation(x)
        rows, alpha = x8.to(v.dtype), alpha.unsqueeze(-1)
        product = F.linear(rows, v)
        ctx.save_for_backward(rows, alpha, v, sigma, product)
        return product.float() * alpha * sigma

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, alpha, v, sigma, product = ctx.saved_tensors
        gradient = gradient.float()
        scaled = (gradient * sigma).to(v.dtype)
        of_x = (scaled @ v).float() if ctx.needs_input_grad[0] else None
        of_v = None
        if ctx.needs_input_grad[1]:
            scaled = (scaled * alpha).to(v.dtype)
            of_v = _rows(scaled).T @ _rows(rows)
        of_sigma = _rows(gradient * alpha * product).sum(0)
        return of_x, of_v, of_sigma


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
