"""Layers of a float checkpoint, each quantized as soon as it is loaded.

A layer has no memory for its weight until the first part of it comes, and gives it back with the
last one, so that no more than a layer or two are in floats at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.parameter import ModelWeightParameter
from torch import Tensor

from ...quantization.config import LiquidConfig
from ..serving.online import quantized
from ..serving.summary import Summary
from ..serving.tensors import EngineLayer
from .linear import PackedLinearMethod, check_whole, refuse
from .parameters import SHARDS


class OnlineLiquidLinearMethod(PackedLinearMethod):
    """Quantizes without data, with one list of residual columns for all that SGLang fuses.

    Under row-parallel tensor parallelism each GPU quantizes its own columns.
    """

    def __init__(self, names: tuple[str, ...], config: LiquidConfig, summary: Summary) -> None:
        super().__init__(names, summary)
        self.config = config

    def create_weights(
        self,
        layer: EngineLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_whole(self.names[0], layer)
        shape = sum(output_partition_sizes), input_size_per_partition
        loader = extra_weight_attrs["weight_loader"]
        missing = set(range(len(output_partition_sizes)))

        def load(place: Any, loaded: Tensor, *shard: int | str | None) -> None:
            if "weight" not in layer._parameters:
                refuse()
            if not place.numel():
                place.data = torch.full(shape, torch.nan, dtype=params_dtype, device=place.device)
            loader(place, loaded, *shard)
            # Of layers that SGLang fuses, one after the other; of one that is fused on disk, all.
            one = shard[0] if shard else None
            missing.difference_update(missing if one is None else {SHARDS.get(one, one)})
            if not missing:
                self._quantize(layer)

        place = torch.empty(0, dtype=params_dtype)
        weight = ModelWeightParameter(data=place, input_dim=1, output_dim=0, weight_loader=load)
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "weight" not in layer._parameters:  # packed already
            return
        if not layer.weight.numel():
            raise ValueError(f"{', '.join(self.names)}: expected weights to be loaded, got nothing")
        self._quantize(layer)

    def _quantize(self, layer: EngineLayer) -> None:
        place = layer.weight
        packed = quantized(place.data, self.config, self.names)
        place.data = torch.empty(0, dtype=place.dtype, device=place.device)  # SGLang still holds it
        self.set_packed(layer, packed)
