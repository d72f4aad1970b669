"""Turn quantized layers of a model into float ones again, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn._modules import detach, paths_of_modules, replace_module
from ..nn.experts import LiquidExperts
from ..nn.fused_layer import unfuse_
from ..nn.linear import LiquidLinear


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace each `LiquidLinear` and `LiquidExperts` of a model by the float layer that it stands
    for, in place.

    The floats are those of the quantized weights: what rounding has taken does not come back. They
    are parameters that can be trained, in an ``nn.Linear`` or, where there was one, a Conv1D. Fused
    layers are those of the model again.

    Args:
        dtype: of weights and biases; None for what each layer had before.

    Returns:
        the model.

    Raises:
        ValueError: the model has no quantized layer, or is one.
    """
    paths = paths_of_modules(model)
    layers = [m for m in paths if isinstance(m, LiquidLinear | LiquidExperts)]
    if not layers or model in layers:
        raise ValueError("model: expected a module that contains quantized layers, got none")
    unfuse_(model)
    for layer in layers:
        linear = (
            _float_layer(layer, dtype)
            if isinstance(layer, LiquidLinear)
            else (layer.to_float(dtype))
        )
        for name in paths[layer]:
            replace_module(model, name, linear)
    detach(model)
    return model


def _float_layer(layer: LiquidLinear, dtype: torch.dtype | None) -> nn.Module:
    dtype = dtype or layer.weight.dtype
    weight = layer.dequantize(dtype)
    linear: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
    if not issubclass(layer.replaces, nn.Linear):
        linear = layer.replaces(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype, copy=True))
    return linear.train(layer.training)
