"""Linear layers of SGLang with our weights."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import Tensor, nn

from ... import ops
from ...weights.weight import Form
from ..serving.layout import Packed, Slice, as_packed
from ..serving.summary import Summary
from ..serving.tensors import CODES, EngineLayer, one_or_each, pack_loaded
from .parameters import PARAMETERS


def part_of(layer: EngineLayer, length: int, total: int) -> Slice:
    """The input features of this GPU: all, or of a row-parallel layer a slice by its rank."""
    if length == total:
        return Slice(0, length, total)
    group = getattr(layer, "tp_group", None)  # before 0.5.17 or so a layer has its own rank
    rank = layer.tp_rank if group is None else group.rank_in_group
    return Slice(rank * length, length, total)


def check_whole(name: str, layer: EngineLayer) -> None:
    """Raises a ValueError for a checkpoint that has a slice of a layer."""
    if getattr(layer, "use_presharded_weights", False):
        raise ValueError(f"{name}: expected a checkpoint of whole layers, got one that is sliced")


class PackedLinearMethod(LinearMethodBase):
    """Computes with a packed weight, which subclasses bring about.

    A layer then has the parameters ``qweight``, the packed weight, ``scale`` and, with residual
    columns, ``columns``.
    """

    def __init__(self, names: tuple[str, ...], summary: Summary) -> None:
        self.names, self.summary = names, summary
        summary.expect(names)

    def set_packed(self, layer: EngineLayer, packed: Packed) -> None:
        """Exchange what was loaded for what is computed with."""
        for name in ("weight", *CODES, "scale", "columns"):
            layer._parameters.pop(name, None)
        held = {"qweight": packed.weight, "scale": packed.scale, "columns": packed.gather}
        for name, tensor in held.items():
            own = None if tensor is None else nn.Parameter(tensor.contiguous(), False)
            layer.register_parameter(name, own)
        layer.qweight.weight_loader = refuse
        layer.liquid_pad = packed.pad
        self.summary.done(self.names, layer.qweight.device)

    def apply(self, layer: EngineLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = as_packed(x, layer.columns, layer.liquid_pad)
        return ops.linear(x, layer.qweight, layer.scale, bias)


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
        check_whole(self.names[0], layer)
        loader = extra_weight_attrs["weight_loader"]
        self.part = part_of(layer, input_size_per_partition, input_size)
        self.rows = list(output_partition_sizes)
        self.forms = one_or_each(self.names, self.forms, self.rows)
        PARAMETERS.register(layer, sum(self.rows), self.part, self.forms, loader)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "qscale" not in layer._parameters:  # packed already
            return
        codes = tuple(getattr(layer, name).data for name in CODES)
        columns = layer.columns.data if "columns" in layer._parameters else None
        given = self.names, codes, layer.scale.data, columns, self.rows, self.forms, self.part
        self.set_packed(layer, pack_loaded(*given))


def refuse(*args, **kwargs) -> None:
    raise RuntimeError(
        "qweight: it is packed, and cannot be loaded into: start the server anew to change weights"
    )
