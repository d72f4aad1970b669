"""The tensors of a checkpoint of ours as parameters, which SGLang's loaders slice and stack.

They are there while a layer is loaded; then it is packed.
"""

from __future__ import annotations

from sglang.srt.layers.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)
from torch import Tensor

from ..serving import tensors

SHARDS: dict[int | str, int] = {"q": 0, "k": 1, "v": 2}


class CodesParameter(tensors.LoadsCodes, ModelWeightParameter):
    """qweight, qscale or qoffset."""


class ColumnsParameter(BasevLLMParameter):
    """Residual columns of layers that are fused: int32 ``[layers, most of them]``, -1 for none."""

    def load_merged_column_weight(
        self, loaded_weight: Tensor, shard_id: int | str, **kwargs
    ) -> None:
        index = SHARDS.get(shard_id, shard_id)
        self.data[index, : len(loaded_weight)].copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


PARAMETERS = tensors.Parameters(
    CodesParameter, ChannelQuantScaleParameter, BasevLLMParameter, ColumnsParameter
)
