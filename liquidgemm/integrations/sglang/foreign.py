"""Layers of other projects' checkpoints, each converted as soon as it is loaded."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.parameter import ChannelQuantScaleParameter
from torch import Tensor

from ..serving.foreign import Collector, ForeignLayer
from ..serving.summary import Summary
from ..serving.tensors import EngineLayer
from .linear import PackedLinearMethod, check_whole, part_of


class ForeignLiquidLinearMethod(PackedLinearMethod):
    """Slices what the tensors of a whole layer become (`Collector`)."""

    def __init__(self, layers: dict[str, ForeignLayer], summary: Summary) -> None:
        super().__init__(tuple(layers), summary)
        self.layers = layers

    def create_weights(
        self,
        layer: EngineLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        check_whole(self.names[0], layer)
        loader = extra_weight_attrs["weight_loader"]

        def rows_of(place: Tensor, numbers: Tensor, shard: tuple[int | str, ...]) -> None:
            own = ChannelQuantScaleParameter(data=place, output_dim=0, weight_loader=loader)
            loader(own, numbers, *shard)

        self.collector = Collector(
            self.layers,
            self.summary,
            sum(output_partition_sizes),
            part_of(layer, input_size_per_partition, input_size),
            rows_of,
            partial(self.set_packed, layer),
        )
        self.collector.register(layer)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        self.collector.check_complete(layer)
