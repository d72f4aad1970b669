"""Where transformers puts the tensors of a checkpoint while it loads.

Each module has the logical layout; it stands in a model's tree for a quantized layer, or for
experts, until all is loaded, and then packs what it got.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from ..formats.liquidquant import padded
from ..nn._modules import as_linear, weight_of
from ..nn.experts import LiquidExperts
from ..nn.float_experts import Layout, layout_of
from ..nn.linear import LiquidLinear
from ..nn.stack import ExpertStack
from ..weights.weight import Form, QuantizedWeight


def tensors_of(augment: int) -> tuple[str, ...]:
    names = ("qweight", "qscale", "qoffset", "scale")
    return (*names, "columns") if augment else names


class UnpackedLayer(nn.Module):
    """Where transformers puts the tensors of a quantized layer while it loads."""

    qweight: torch.Tensor
    qscale: torch.Tensor
    qoffset: torch.Tensor
    scale: torch.Tensor
    columns: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Module, form: Form) -> None:
        super().__init__()
        self.replaces = type(layer)
        self._shape = weight_of(layer).shape
        linear = cast(nn.Linear, as_linear(layer))
        n, self.in_features = linear.out_features, linear.in_features
        self.group_size, augment = form.group_size, form.augment
        columns = padded(self.in_features) + augment
        for name, each in (
            ("qweight", 2),
            ("qscale", self.group_size),
            ("qoffset", self.group_size),
        ):
            data = torch.empty(n, columns // each, dtype=torch.uint8, device="meta")
            self.register_buffer(name, data)
        self.register_buffer("scale", torch.empty(n, dtype=torch.float32, device="meta"))
        repeated = torch.empty(augment, dtype=torch.int32, device="meta") if augment else None
        self.register_buffer("columns", repeated)
        self.dtype, bias = linear.weight.dtype, linear.bias
        self.register_buffer(
            "bias", None if bias is None else torch.empty_like(bias, device="meta")
        )

    def without_data(self) -> LiquidLinear:
        return LiquidLinear(
            self.in_features,
            len(self.scale),
            bias=self.bias is not None,
            augment=0 if self.columns is None else len(self.columns),
            group_size=self.group_size,
            device="meta",
            dtype=self.dtype if self.bias is None else self.bias.dtype,
        ).train(self.training)

    @property
    def weight(self) -> torch.Tensor:
        """Without data: the initialization of what is around this layer may ask for it."""
        return torch.empty(self._shape, dtype=self.dtype, device="meta")

    def pack(self, name: str) -> LiquidLinear:
        if self.qweight.is_meta:
            raise ValueError(f"{name}: expected a device_map of CPU or GPUs, got it offloaded")
        try:
            weight = QuantizedWeight(
                self.qweight, self.qscale, self.qoffset, self.scale, self.in_features, self.columns
            )
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        layer = LiquidLinear.from_quantized(weight, self.bias, self.dtype)
        layer.replaces = self.replaces
        return layer.train(self.training)


def state_of_experts(sizes: Mapping) -> dict[str, torch.Tensor]:
    return LiquidExperts(**sizes, device="meta").state_dict()


class UnpackedStack(nn.Module):
    """Where transformers puts the tensors of one of the two stacks of some experts."""

    def __init__(self, like: ExpertStack, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in like.state_dict().items():
            self.register_buffer(name, tensor.to(dtype) if name == "bias" else tensor)


class UnpackedExperts(nn.Module):
    """Where transformers puts the tensors of experts while it loads."""

    def __init__(self, experts: nn.Module, sizes: Mapping) -> None:
        super().__init__()
        self._held = (experts, dict(sizes))  # the module as a whole is on the meta device
        self.dtype = next(experts.parameters()).dtype
        self.num_experts = sizes["num_experts"]
        like = LiquidExperts(**sizes, device="meta")
        self.gate_up = UnpackedStack(like.gate_up, self.dtype)
        self.down = UnpackedStack(like.down, self.dtype)

    def without_data(self) -> LiquidExperts:
        experts, sizes = self._held
        layer = LiquidExperts(**sizes, device="meta", dtype=self.dtype)
        layer.stands_for(experts, cast(Layout, layout_of(experts)))
        return layer.train(self.training)

    def pack(self, name: str) -> LiquidExperts:
        layer = self.without_data()
        for part, stack, into in (
            ("gate_up", self.gate_up, layer.gate_up),
            ("down", self.down, layer.down),
        ):
            tensors = dict(stack.named_buffers())
            if tensors["qweight"].is_meta:
                raise ValueError(f"{name}: expected a device_map of CPU or GPUs, got it offloaded")
            try:
                into.load_logical(tensors, tensors["scale"].device)
            except ValueError as error:
                raise ValueError(f"{name}.{part}: {error}") from None
        return layer
