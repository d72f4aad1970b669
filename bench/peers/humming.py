"""humming-kernels (PyPI), INT8 activations and 4-bit weights in groups of 64 with zero points."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .base import Peer, Unsupported, Way, exact_product


class Humming(Peer):
    """The same number of bits in the same groups as liquidgemm, by a JIT compiler.

    It needs nvcc (or NVRTC) at run time and picks its configuration by its own heuristic.
    """

    name = "humming"
    package = "humming-kernels"
    module = "humming"
    ways = (Way("gemm"), Way("linear"))
    tolerance = 0.03

    def __init__(self, weight: Tensor) -> None:
        from humming.layer import HummingLayer

        n, k = weight.shape
        if k % 64:
            raise Unsupported("groups of 64 need K to be a multiple of 64")
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "uint4", "group_size": 64, "has_zero_point": True},
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
        if way.op == "gemm":
            x, x_scale = x[rows], x_scale.reshape(-1, 1)[rows]
        return exact_product(x, self.dequantized) * x_scale.reshape(-1, 1).double()
