"""What torch itself offers: bf16, FP8 and INT8 by cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Peer, Unsupported, Way, exact_product

FP8_MAX = 448.0  # of e4m3


class Bf16(Peer):
    """``F.linear`` in bf16: nothing is quantized, so that gemm and linear are the same."""

    name = "bf16"
    ways = (Way("both"),)
    tolerance = 0.01

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def tokens(self, way: Way, x: Tensor) -> Tensor:
        return x

    def call(self, way: Way, tokens: Tensor, weight: Tensor) -> Tensor:
        return F.linear(tokens, weight)

    def expected(self, way: Way, tokens: Tensor, rows: Tensor) -> Tensor:
        return exact_product(tokens[rows], self.weight)


class Fp8(Peer):
    """``torch._scaled_mm`` on e4m3 weights and activations, with fast accumulation.

    Scales per tensor and per row are timed apart; the faster one counts.
    """

    name = "fp8"
    ways = (Way("gemm", "tensor"), Way("gemm", "row"))
    tolerance = 0.02

    def __init__(self, weight: Tensor) -> None:
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise Unsupported("torch._scaled_mm needs N and K to be multiples of 16")
        one_scale = weight.abs().amax().float() / FP8_MAX
        # One set of bytes serves both: per-row scales that happen to be equal take as long.
        self.scale = {"tensor": one_scale, "row": one_scale.expand(1, len(weight)).contiguous()}
        self.weight = torch.cat(
            [(part.float() / one_scale).to(torch.float8_e4m3fn) for part in weight.split(4096)]
        )

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def tokens(self, way: Way, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        if way.variant == "row":
            scale = x.abs().amax(1, keepdim=True) / FP8_MAX
        else:
            scale = x.abs().amax() / FP8_MAX
        return (x / scale).to(torch.float8_e4m3fn), scale

    def call(self, way: Way, tokens: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        x, x_scale = tokens
        return torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=self.scale[way.variant],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def expected(self, way: Way, tokens: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        x, x_scale = tokens
        x = x.view(torch.uint8)[rows].view(x.dtype)  # 8-bit floats cannot be indexed everywhere
        x_scale = x_scale[rows] if way.variant == "row" else x_scale
        return exact_product(x, self.weight) * x_scale * self.scale[way.variant]


class Int8(Peer):
    """``torch._int_mm``: the bare W8A8 product, INT32 out; scales and conversion not counted."""

    name = "int8"
    ways = (Way("gemm"),)
    tolerance = 0.0
    min_tokens = 17  # of torch._int_mm

    def __init__(self, weight: Tensor) -> None:
        if weight.shape[0] % 8 or weight.shape[1] % 8:
            raise Unsupported("torch._int_mm needs N and K to be multiples of 8")
        scale = weight.abs().amax(1, keepdim=True).float() / 127
        self.weight = torch.cat(
            [
                (part.float() / part_scale).round().to(torch.int8)
                for part, part_scale in zip(weight.split(4096), scale.split(4096), strict=True)
            ]
        )

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def tokens(self, way: Way, x: Tensor) -> Tensor:
        x = x.float()
        return (x * (127 / x.abs().amax(1, keepdim=True))).round().to(torch.int8)

    def call(self, way: Way, tokens: Tensor, weight: Tensor) -> Tensor:
        return torch._int_mm(tokens, weight.t())

    def expected(self, way: Way, tokens: Tensor, rows: Tensor) -> Tensor:
        return exact_product(tokens[rows], self.weight).to(torch.int32)
