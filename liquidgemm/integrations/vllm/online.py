"""Layers of a float checkpoint, each quantized as soon as it is loaded.

vLLM keeps their weights on the meta device until all of a layer has been read, so that no more than
a layer or two are in floats at a time.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from ...quantization.config import LiquidConfig
from ..serving.online import quantized
from ..serving.tensors import EngineLayer
from . import exact
from .linear import PackedLinearMethod
from .summary import Summary

# The attribute of a layer whose weights are done; vLLM deletes it as it reloads a layer.
DONE = "_already_called_process_weights_after_loading"


@register_weight_loader_v2_supported_method
class OnlineLiquidLinearMethod(PackedLinearMethod):
    """Quantizes without data, with one list of residual columns for all that vLLM fuses.

    Under row-parallel tensor parallelism each GPU quantizes its own columns.
    """

    uses_meta_device = True

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
        **extra_weight_attrs,
    ) -> None:
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=params_dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)
        self.split(layer, input_size_per_partition, input_size)
        if self.exact:
            exact.refuse(
                self.names[0],
                "slices that are quantized one by one while loading",
                "run `liquidgemm quantize` and serve its output",
            )

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if getattr(layer, DONE, False):
            return
        self.set_packed(layer, quantized(layer.weight.data, self.config, self.names))
        setattr(layer, DONE, True)
