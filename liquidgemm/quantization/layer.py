"""One layer: from a float weight and the moments of its inputs to a quantized weight."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..nn._modules import matches
from ..weights.liquidquant import GROUP
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, dequantize_weight
from .calibration.gptq import add_residual, gptq, int8_weight, refit_scale, worst_columns
from .calibration.moments import Moments, inverse_factor
from .config import LiquidConfig

# With fewer tokens than a quarter of the columns, H says more about them than about the layer: so
# it is with experts that few tokens reach.
_FEW = 4


def residual_columns(config: LiquidConfig, name: str, in_features: int) -> int:
    """How many residual columns a layer gets."""
    count = config.augment
    if isinstance(count, dict):
        count = next((c for pattern, c in count.items() if matches(name, pattern)), 0)
    return min(count, in_features // GROUP * GROUP)


def layer_method(config: LiquidConfig, name: str, has_data: bool) -> str:
    """What becomes of a layer that is not skipped: a method of `LiquidConfig`, or "int8"."""
    if any(matches(name, pattern) for pattern in config.keep):
        return "int8"
    if has_data or config.method in ("rtn", "search"):
        return config.method
    return "search"


def quantize_layer(
    weight: Tensor,
    config: LiquidConfig,
    name: str = "layer",
    moments: Moments | None = None,
) -> tuple[QuantizedWeight, str]:
    """Quantize ``weight [N, K]`` by the method that the config has for this name.

    Without moments, the methods that need them become "search".

    Returns:
        the weight and the method that was used.
    """
    method = layer_method(config, name, moments is not None)
    weight = weight.detach().float()
    if method == "int8":
        return int8_weight(weight), method
    importance = None
    if method in ("hessian", "gptq"):
        weight = weight * (moments.hessian.diagonal() > 0)  # dead columns: as if they were zero
        importance = moments.importance(config.shrinkage)
        if not importance.any():
            importance = None
    rounding = "rtn" if method == "rtn" else "search"
    base = quantize_weight(weight, config.group_size, rounding, importance)
    columns = None
    if count := residual_columns(config, name, weight.shape[1]):
        columns = worst_columns(weight, dequantize_weight(base), importance, count)
    if method == "gptq" and _FEW * moments.tokens < weight.shape[1]:
        warnings.warn(
            f"{name}: {moments.tokens} tokens are too few for {weight.shape[1]} columns: quantized "
            'with method "hessian" instead of "gptq"',
            stacklevel=2,
        )
        method = "hessian"
    if method == "gptq":
        hessian = moments.regularized(config.damping, config.shrinkage)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(hessian[order][:, order], name)
        if factor is not None:
            result = gptq(weight, base, factor, order, columns)
            return refit_scale(weight, result, hessian), method
        method = "hessian"
    return (base if columns is None else add_residual(weight, base, columns)), method


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖² / ‖expected‖²``."""
    norm = expected.double().square().sum()
    error = (actual.double() - expected.double()).square().sum()
    return (error / norm.clamp_min(torch.finfo(torch.float64).tiny)).item()
