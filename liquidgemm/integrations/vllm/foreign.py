"""Layers of other projects' checkpoints, each converted as soon as it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from ...weights.weight import QuantizedWeight
from ..serving.foreign import ForeignLayer, convert
from ..serving.layout import pack
from ..serving.tensors import EngineLayer, EngineParameter
from .linear import PackedLinearMethod
from .summary import Summary

_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}


@register_weight_loader_v2_supported_method
class ForeignLiquidLinearMethod(PackedLinearMethod):
    """Collects the tensors of a layer whole, as they are on the disk, and slices what they become.

    So a slice is that of the whole layer's conversion, whatever the size of tensor parallelism.
    """

    def __init__(self, layers: dict[str, ForeignLayer], summary: Summary) -> None:
        super().__init__(tuple(layers), summary)
        self.layers = list(layers.values())
        self.tensors: list[dict[str, Tensor]] = [{} for _ in layers]
        self.shards: list[int | str | None] = [None for _ in layers]

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
        self.loader = extra_weight_attrs["weight_loader"]
        self.part = self.split(layer, input_size_per_partition, input_size)
        self.rows = sum(output_partition_sizes)
        self.device = torch.get_default_device()
        for key in sorted({key for own in self.layers for key in own.keys} - {"bias"}):
            # Empty: a place by whose name vLLM finds the loader.
            place: EngineParameter = nn.Parameter(
                torch.empty(0, dtype=torch.uint8), requires_grad=False
            )
            place.weight_loader = self._collector(layer, key)
            layer.register_parameter(key, place)

    def _collector(self, layer: EngineLayer, key: str):
        def collect(param: Tensor, loaded: Tensor, shard: int | str | None = None) -> None:
            index = shard if isinstance(shard, int) else _SHARDS[shard]
            if "scale" in layer._parameters:
                raise RuntimeError(
                    f"{self.names[index]}.{key}: it is converted already: weights of a checkpoint "
                    "that is converted while loading cannot be loaded again; run `liquidgemm "
                    "import` and serve its output"
                )
            self.shards[index] = shard
            self.tensors[index][key] = loaded.detach().clone()  # the loader may reuse its memory
            if all(
                held.keys() >= set(own.keys) - {"bias"}
                for held, own in zip(self.tensors, self.layers, strict=True)
            ):
                self._convert(layer)

        return collect

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "scale" in layer._parameters:
            return
        for name, held, own in zip(self.names, self.tensors, self.layers, strict=True):
            if missing := sorted(set(own.keys) - held.keys() - {"bias"}):
                raise ValueError(f"{name}.{missing[0]}: expected it to be loaded, got nothing")

    def _convert(self, layer: EngineLayer) -> None:
        weights: list[QuantizedWeight] = []
        for name, own, tensors, shard in zip(
            self.names, self.layers, self.tensors, self.shards, strict=True
        ):
            try:
                source = own.read({key: t.to(self.device) for key, t in tensors.items()})
                rows = self._own_rows(layer, source.shape[0], shard)
                weight, error = convert(source, (rows - 1).clamp(min=0))
            except (ValueError, RuntimeError) as problem:
                raise ValueError(f"{name}: {problem}") from None
            self.summary.imported(name, error)
            # vLLM fills up vocabularies.
            weights.append(replace(weight, scale=torch.where(rows > 0, weight.scale, 0)))
            tensors.clear()
        packed = pack(
            self._stacked(weights),
            torch.cat([weight.scale for weight in weights]),
            [weight.out_features for weight in weights],
            [self.part.of_columns(_columns(weight)) for weight in weights],
            self.part,
        )
        for key in {key for own in self.layers for key in own.keys} - {"bias"}:
            if key in layer._parameters:
                delattr(layer, key)
        self.set_packed(layer, packed)

    def _own_rows(self, layer: EngineLayer, count: int, shard: int | str | None) -> Tensor:
        """Which rows of a whole layer this GPU has, from 1 on, and 0 for one that fills up.

        vLLM's own loader says so, by loading the numbers of the rows in their place.
        """
        place = ChannelQuantScaleParameter(
            data=torch.full((self.rows,), -1, device=self.device),
            output_dim=0,
            weight_loader=self.loader,
        )
        place.tp_rank, place.tp_size = layer.tp_rank, layer.tp_size
        numbers = torch.arange(1, count + 1, device=self.device)
        self.loader(place, numbers, *(() if shard is None else (shard,)))
        return place.data[place.data >= 0]

    def _stacked(self, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of all of them, those of the narrower ones filled up."""

        def stacked(name: str) -> Tensor:
            own = [self.part.of_codes(getattr(w, name), w.augment) for w in weights]
            width = max(tensor.shape[1] for tensor in own)
            return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in own])

        return stacked("qweight"), stacked("qscale"), stacked("qoffset")


def _columns(weight: QuantizedWeight) -> Tensor:
    if weight.columns is None:
        return torch.empty(0, dtype=torch.int32, device=weight.scale.device)
    return weight.columns
