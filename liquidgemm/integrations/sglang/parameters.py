"""The tensors of a checkpoint of ours as parameters, which SGLang's loaders slice and stack.

They are there while a layer is loaded; then it is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang.srt.layers.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)
from torch import Tensor

from ..serving import tensors
from ..serving.layout import Slice

_SHARDS = {"q": 0, "k": 1, "v": 2}


class CodesParameter(ModelWeightParameter):
    """qweight, qscale or qoffset: rows as those of a weight, columns with residual ones behind.

    Args:
        rows: N of this GPU.
        name: which of the three.
        part: the columns of this GPU.
        augments: the number of residual columns of each layer. Rows are as wide as those of the
            layer that has the most.
    """

    def __new__(cls, rows: int, name: str, part: Slice, augments: Sequence[int], **kwargs):
        return super().__new__(cls, tensors.empty(rows, name, part, augments))

    def __init__(
        self,
        rows: int,
        name: str,
        part: Slice,
        augments: Sequence[int],
        weight_loader: Callable,
    ) -> None:
        self._name, self._part, self._augments = name, part, tuple(set(augments))
        super().__init__(data=self.data, output_dim=0, input_dim=1, weight_loader=weight_loader)

    def _checked(self, loaded: Tensor) -> Tensor:
        return tensors.checked(loaded, self._name, self._part, self._augments)

    def _as_wide(self, loaded: Tensor) -> Tensor:
        return tensors.as_wide(self._checked(loaded), self.data.shape[1])

    def load_column_parallel_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        super().load_column_parallel_weight(self._as_wide(loaded_weight), *args, **kwargs)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        super().load_merged_column_weight(self._as_wide(loaded_weight), **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        super().load_qkv_weight(self._as_wide(loaded_weight), *args, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        (augment,) = self._augments
        self._assert_and_load(self._part.of_codes(self._checked(loaded_weight), augment))


class ColumnsParameter(BasevLLMParameter):
    """Residual columns of layers that are fused: int32 ``[layers, most of them]``, -1 for none."""

    def load_merged_column_weight(
        self, loaded_weight: Tensor, shard_id: int | str, **kwargs
    ) -> None:
        index = _SHARDS.get(shard_id, shard_id)
        self.data[index, : len(loaded_weight)].copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


def scale_parameter(rows: int, weight_loader: Callable) -> ChannelQuantScaleParameter:
    data = tensors.empty_scale(rows)
    return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=weight_loader)


def columns_parameter(augments: Sequence[int], weight_loader: Callable) -> BasevLLMParameter:
    kind = BasevLLMParameter if len(augments) == 1 else ColumnsParameter
    return kind(data=tensors.empty_columns(augments), weight_loader=weight_loader)
