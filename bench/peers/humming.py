"""humming-kernels (PyPI): INT8 activations and 4-bit weights, compiled at run time."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Peer, Unsupported, Way, exact_product


class Humming(Peer):
    """The same number of bits in the same groups as liquidgemm: groups of 64 with zero points.

    It needs nvcc at run time and picks its configuration by its own heuristic. Group scales become
    integers of 11 bits per tensor inside its kernel, which the tolerance has to cover.
    """

    name = "humming"
    package = "humming-kernels"
    module = "humming"
    ways = (Way("gemm"), Way("linear"))
    tolerance = 0.01
    group: ClassVar[int] = 64  # 0: one scale per output channel
    zero_points: ClassVar[bool] = True

    def __init__(self, weight: Tensor) -> None:
        from humming.layer import HummingLayer

        n, k = weight.shape
        if self.group and k % self.group:
            raise Unsupported(f"groups of {self.group} need K to be a multiple of {self.group}")
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={
                "dtype": "uint4",
                "group_size": self.group,
                "has_zero_point": self.zero_points,
            },
            input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).to(weight.device)
        tensors = layer.weight_schema.quant_tensor(weight, layer.weight_schema, torch.bfloat16)
        self.dequantized = layer.weight_schema.dequant_tensors(tensors)
        layer.load_from_tensors(tensors)
        layer.transform()
        self.layer = layer

    def new_copy(self) -> Any:
        return copy.deepcopy(self.layer)

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.layer.parameters())

    def tokens(self, way: Way, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if way.op == "linear":
            return x, None
        return self._quantize(x)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from humming.forward import may_quant_input

        return may_quant_input(self.layer.humming_config, x)

    def call(self, way: Way, tokens: tuple[Tensor, Tensor | None], weight: Any) -> Tensor:
        x, x_scale = tokens
        return weight(x, input_scale=x_scale)

    def expected(self, way: Way, tokens: tuple[Tensor, Tensor | None], rows: Tensor) -> Tensor:
        x, x_scale = self._quantize(tokens[0][rows]) if way.op == "linear" else tokens
        x_scale = x_scale.reshape(-1, 1)
        if way.op == "gemm":
            x, x_scale = x[rows], x_scale[rows]
        return exact_product(x, self.dequantized) * x_scale.double()


class HummingGroup128(Humming):
    """Groups of 128 without zero points: fewer bits and less arithmetic than liquidgemm needs."""

    name = "humming-g128"
    group = 128
    zero_points = False


class HummingChannel(Humming):
    """One scale per output channel, no zero points: its fastest mode, and its least accurate."""

    name = "humming-channel"
    group = 0
    zero_points = False
