"""Linear layers of vLLM with our weights."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import replace_parameter

from ... import ops
from ...weights.weight import Form
from ..serving.layout import Packed, Slice, as_packed
from ..serving.tensors import CODES, EngineLayer, empty, one_or_each, pack_loaded
from . import exact
from .fusion import advertise, as_quantized
from .parameters import PARAMETERS, dummy_codes
from .summary import Summary


def part_of(layer: EngineLayer, length: int, total: int) -> Slice:
    """The input features of this GPU: all, or of a row-parallel layer a slice by its rank."""
    return Slice(0 if length == total else layer.tp_rank * length, length, total)


class PackedLinearMethod(LinearMethodBase):
    """Computes with a packed weight, which subclasses bring about.

    A layer then has the parameters ``qweight``, the packed weight (by this name LoRA finds its
    device), ``scale`` and, with residual columns, ``columns``.
    """

    exact = False  # whether GPUs that split the layer by inputs give the bits of one

    def __init__(self, names: tuple[str, ...], summary: Summary) -> None:
        self.names, self.summary = names, summary
        summary.expect(names)

    def split(self, layer: EngineLayer, length: int, total: int) -> Slice:
        """The input features of this GPU, and whether it has to ask the others for anything."""
        part = part_of(layer, length, total)
        self.exact = length != total and exact.asked()
        if not self.exact:
            advertise(layer)
        return part

    def set_packed(self, layer: EngineLayer, packed: Packed) -> None:
        """Exchange what was loaded for what is computed with."""
        for name in ("weight", *CODES, "scale", "columns"):
            if name in layer._parameters:
                delattr(layer, name)
        held = {"qweight": packed.weight, "scale": packed.scale, "columns": packed.gather}
        for name, tensor in held.items():
            if tensor is not None:
                replace_parameter(layer, name, tensor.contiguous())
        # For those that load into a layer without vLLM's reload_weights.
        layer.qweight.weight_loader = _refuse
        layer.liquid_pad = packed.pad
        if self.exact and not getattr(layer, "liquid_exact", False):
            exact.take_over(layer, self.names[0])
            self.summary.exact += 1
        layer.liquid_exact = self.exact
        if packed.gather is None:  # no plain attribute: a reload registers that of the checkpoint
            layer.register_parameter("columns", None)
        _say_dtype(layer)
        self.summary.done(self.names, layer.qweight.device)

    def apply(self, layer: EngineLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.liquid_exact:
            return exact.row_parallel(layer, x)
        given = as_quantized(x)
        if given is None:
            x = as_packed(x, layer.columns, layer.liquid_pad)
            return ops.linear(x, layer.qweight, layer.scale, bias)
        x8, x_scale, dtype = given
        x8 = as_packed(x8, layer.columns, layer.liquid_pad)
        return ops.gemm(x8, x_scale, layer.qweight, layer.scale, bias, dtype)


def _say_dtype(layer: EngineLayer) -> None:
    """vLLM asks the weight of a head for its dtype and device, to make room for adapters."""
    config = get_current_vllm_config_or_none()
    if isinstance(layer, ParallelLMHead) and config is not None and config.lora_config is not None:
        dtype, device = config.model_config.dtype, layer.qweight.device
        layer.weight = torch.empty(0, dtype=dtype, device=device)


def _refuse(*args, **kwargs) -> None:
    raise RuntimeError(
        "qweight: it is packed, and cannot be loaded into: use reload_weights of the model runner "
        "(llm.collective_rpc('reload_weights')), which unpacks, loads and packs each layer"
    )


@register_weight_loader_v2_supported_method
class LiquidLinearMethod(PackedLinearMethod):
    """Layers that a checkpoint of ours has quantized."""

    def __init__(self, names: tuple[str, ...], forms: tuple[Form, ...], summary: Summary) -> None:
        super().__init__(names, summary)
        self.forms = forms

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
        loader = extra_weight_attrs["weight_loader"]
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        self.part = self.split(layer, input_size_per_partition, input_size)
        self.rows = list(output_partition_sizes)
        self.forms = one_or_each(self.names, self.forms, self.rows)
        codes = dummy_codes if self.dummy else empty
        PARAMETERS.register(layer, sum(self.rows), self.part, self.forms, loader, codes)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "qscale" not in layer._parameters:  # packed already
            return
        codes = tuple(getattr(layer, name).data for name in CODES)
        scale = layer.scale.data
        if self.dummy:
            scale = scale.abs()
        columns = layer._parameters.get("columns")
        columns = None if columns is None else columns.data
        if self.dummy and columns is not None:
            some = torch.arange(columns.numel(), dtype=torch.int32, device=columns.device)
            columns = some.view(columns.shape) % self.part.total
        given = self.names, codes, scale, columns, self.rows, self.forms, self.part
        self.set_packed(layer, pack_loaded(*given))
