"""liquidgemm itself."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

import liquidgemm
from liquidgemm.formats import liquidquant6
from liquidgemm.formats.liquidquant import decode, padded
from liquidgemm.ops import _library

from ..core import machine
from .base import Peer, Way, exact_product


class Liquid(Peer):
    """W4A8 in the LiquidQuant format, rounded as in the paper. Every bit of the result counts."""

    name = "liquidgemm"
    package = "liquidgemm"
    module = "liquidgemm"
    ways = (Way("gemm"), Way("linear"))
    tolerance = 0.0
    bits = 4
    group_size = 64

    @classmethod
    def why_absent(cls) -> str | None:
        status = _library.status()
        return None if status.cuda_available else status.reason

    @classmethod
    def version(cls) -> str:
        return liquidgemm.__version__

    def __init__(self, weight: Tensor) -> None:
        quantized = liquidgemm.quantize_weight(weight, self.group_size, method="rtn")
        logical = (quantized.qweight, quantized.qscale, quantized.qoffset)
        self.scale = quantized.scale
        self.w8 = decode(*logical)[:, : weight.shape[1]]
        self.packed = liquidgemm.pack_weight(*logical)

    def new_copy(self) -> Tensor:
        return self.packed.clone()

    def weight_bytes(self) -> int:
        return self.packed.nbytes

    def tokens(self, way: Way, x: Tensor) -> tuple[Tensor, ...]:
        return liquidgemm.quantize_activation(x) if way.op == "gemm" else (x,)

    def call(self, way: Way, tokens: tuple[Tensor, ...], weight: Tensor) -> Tensor:
        if way.op == "gemm":
            return liquidgemm.gemm(*tokens, weight, self.scale)
        return liquidgemm.linear(*tokens, weight, self.scale)

    def expected(self, way: Way, tokens: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """The documented arithmetic, each operation rounded to float32 by itself."""
        if way.op == "gemm":
            x8, x_scale = (part[rows] for part in tokens)
        else:
            # The specification of quantize_activation, on the CPU: not the kernel that ran.
            x8, x_scale = liquidgemm.quantize_activation(tokens[0][rows].cpu())
            x8, x_scale = x8.to(self.w8.device), x_scale.to(self.w8.device)
        sums = exact_product(x8, self.w8).float()
        return (sums * x_scale.unsqueeze(1) * self.scale).to(torch.bfloat16)

    def describe(self, way: Way, m: int) -> str:
        with suppress(AttributeError, RuntimeError):  # a build without the testing ops
            of = self.w8.device, self.bits, self.group_size
            return machine.chosen_plan(m, *self.w8.shape, *of)
        return ""


class Liquid32(Liquid):
    """W4A8 in groups of 32, rounded as those of 64. Every bit of the result counts."""

    name = "liquidgemm-g32"
    group_size = 32


class Liquid6(Liquid):
    """W6A8: codes of 6 bits, rounded as those of 4. Every bit of the result counts."""

    name = "liquidgemm-6bit"
    bits = 6

    def __init__(self, weight: Tensor) -> None:
        quantized = liquidgemm.quantize_weight(weight, method="rtn", bits=6)
        logical = liquidquant6.to_kernel(quantized.qweight, quantized.qscale, quantized.qoffset)
        self.scale = quantized.scale
        self.w8 = decode(*logical)[:, : weight.shape[1]]
        self.packed = liquidgemm.pack_weight(*logical)


class LiquidInt8(Liquid):
    """W8A8: INT8 weights, which the kernel does not decode. Every bit of the result counts."""

    name = "liquidgemm-int8"
    bits = 8

    def __init__(self, weight: Tensor) -> None:
        n, k = weight.shape
        self.scale = weight.abs().amax(1).float() / 127
        w8 = torch.empty(n, padded(k), dtype=torch.int8, device=weight.device)
        w8[:, k:] = 0
        for to, part, scale in zip(*(t.split(4096) for t in (w8, weight, self.scale)), strict=True):
            to[:, :k] = (part.float() / scale.unsqueeze(1)).round()
        self.w8 = w8[:, :k]
        self.packed = liquidgemm.pack_int8_weight(w8)
