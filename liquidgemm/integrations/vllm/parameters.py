"""The tensors of a checkpoint of ours as parameters, which vLLM's loaders slice and stack.

They are there while a layer is loaded; then it is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)

from ...formats.int8 import logical_of
from ...formats.liquidquant import GROUP, padded
from ...weights.weight import Form
from ..serving import tensors
from ..serving.layout import Slice


class _ChecksRows(tensors.Mixin):
    """Refuses tensors of another dtype, or of other rows than those that vLLM slices: it would take
    what it needs of more, and round what has another dtype."""

    def _check(self, loaded: Tensor, rows: int) -> None:
        if loaded.dtype != self.data.dtype or not loaded.dim() or len(loaded) != rows:
            raise ValueError(
                f"{self._name}: expected {self.data.dtype} of {rows} rows, got {loaded.dtype} of "
                f"shape {list(loaded.shape)}"
            )

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, len(self.data) * self.tp_size)
        super().load_column_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        self._check(loaded_weight, kwargs["shard_size"] * self.tp_size)
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        replicas = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        self._check(loaded_weight, kwargs["shard_size"] * (self.tp_size // replicas))
        super().load_qkv_weight(loaded_weight, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, len(self.data))
        super().load_row_parallel_weight(loaded_weight)


class CodesParameter(_ChecksRows, tensors.LoadsCodes, ModelWeightParameter):
    """qweight, qscale or qoffset."""


class ScaleParameter(_ChecksRows, ChannelQuantScaleParameter):
    """scale."""

    _name = "scale"


def dummy_codes(rows: int, name: str, part: Slice, forms: Sequence[Form]) -> Tensor:
    """Random, which vLLM's dummy loader makes of floats only; 8 bits where all columns are stored
    twice."""
    shape = tensors.shape_of(rows, name, part, forms)
    if name == "qweight":
        return torch.randint(256, shape, dtype=torch.uint8)
    if set(forms) == {Form(padded(part.total))}:
        _, *grid = logical_of(torch.zeros(1, shape[1] * GROUP // 2, dtype=torch.int8))
        return grid[0 if name == "qscale" else 1].repeat(rows, 1)
    return torch.full(shape, 8 if name == "qscale" else 68, dtype=torch.uint8)


class ColumnsParameter(BasevLLMParameter):
    """Residual columns of layers that vLLM fuses: int32 ``[layers, most of them]``, -1 for none."""

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        index = self._shard_id_as_int(kwargs["shard_id"])
        self.data[index, : len(loaded_weight)].copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


PARAMETERS = tensors.Parameters(CodesParameter, ScaleParameter, BasevLLMParameter, ColumnsParameter)
