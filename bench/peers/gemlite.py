"""GemLite (PyPI, Triton): bf16 activations and 4-bit weights in groups of 64 with zero points."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .base import Peer, Unsupported, Way, exact_product

GROUP = 64


class GemLite(Peer):
    """W4A16, its usual mode for 4-bit weights: activations are not quantized.

    Triton tunes itself at the first call of each size, which may take minutes.
    """

    name = "gemlite"
    package = "gemlite"
    module = "gemlite"
    ways = (Way("both"),)
    tolerance = 0.02

    def __init__(self, weight: Tensor) -> None:
        from gemlite.helper import A16W4_HQQ_INT

        n, k = weight.shape
        if k % GROUP or n % 32:
            raise Unsupported(f"needs K to be a multiple of {GROUP} and N of 32")
        groups = weight.float().view(-1, GROUP)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / 15).to(weight.dtype)
        zero = (-low / scale.float()).round()
        codes = (groups / scale.float() + zero).round().clamp(0, 15)
        # As its kernel does: a multiply-add with -zero * scale, which is stored in bf16.
        shift = (-zero * scale.float()).to(torch.bfloat16).float()
        self.dequantized = (codes * scale.float() + shift).to(torch.bfloat16).view(n, k)
        maker = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
        self.layer = maker.from_weights(
            codes.to(torch.uint8).view(n, k), scale, zero.to(weight.dtype)
        )

    def new_copy(self) -> Any:
        return copy.deepcopy(self.layer)

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.layer.parameters())

    def tokens(self, way: Way, x: Tensor) -> Tensor:
        return x

    def call(self, way: Way, tokens: Tensor, weight: Any) -> Tensor:
        return weight(tokens)

    def expected(self, way: Way, tokens: Tensor, rows: Tensor) -> Tensor:
        return exact_product(tokens[rows], self.dequantized)
