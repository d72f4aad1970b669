"""One layer: from a float weight and the moments of its inputs to a quantized weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.liquidquant import GROUP
from ..nn._modules import matches
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, dequantize_weight
from .calibration.gptq import (
    add_residual,
    column_error,
    gptq,
    int8_weight,
    refit_scale,
    worst_columns,
)
from .calibration.moments import Moments, inverse_factor
from .config import LiquidConfig

# With fewer tokens than a quarter of the columns, H says more about them than about the layer: so
# it is with experts that few tokens reach.
_FEW = 4


def layer_bits(config: LiquidConfig, name: str) -> int:
    """Of a weight of a layer that is not skipped: 4, 6 or 8."""
    if any(matches(name, pattern) for pattern in config.keep):
        return 8
    return next((bits for pattern, bits in config.bits.items() if matches(name, pattern)), 4)


def residual_columns(config: LiquidConfig, name: str, in_features: int) -> int:
    """How many residual columns a layer gets."""
    if layer_bits(config, name) != 4:
        return 0
    count = config.augment
    if not isinstance(count, int):
        count = next((c for pattern, c in count.items() if matches(name, pattern)), 0)
    return min(count, in_features // GROUP * GROUP)


def layer_method(config: LiquidConfig, name: str, has_data: bool) -> str:
    """What becomes of a layer that is not skipped: a method of `LiquidConfig`, or "int8"."""
    if layer_bits(config, name) == 8:
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
    (result,) = quantize_layers({name: weight}, config, moments)
    return result


def quantize_layers(
    weights: Mapping[str, Tensor], config: LiquidConfig, moments: Moments | None = None
) -> Iterator[tuple[QuantizedWeight, str]]:
    """`quantize_layer` for layers of the same input, by name.

    With ``config.share_columns``, those that have as many residual columns have the same ones, so
    that they can be computed as one product: the columns with the most error in all of them.
    """
    drafts = [_draft(weight, config, name, moments) for name, weight in weights.items()]
    errors: dict[int, Tensor] = {}
    for draft in drafts if config.share_columns else ():
        if draft.error is not None:
            before = errors.get(draft.count)
            errors[draft.count] = draft.error if before is None else before + draft.error
    for draft in drafts:
        columns = None
        if draft.error is not None:
            columns = worst_columns(errors.get(draft.count, draft.error), draft.count)
        yield _finished(draft, columns, config, moments)


@dataclass
class _Draft:
    """A weight on its grid, before its residual columns are chosen.

    Attributes:
        error: float32 ``[K]``, of each column at the output; None if there are no residual columns.
        count: of those.
    """

    name: str
    method: str
    weight: Tensor
    base: QuantizedWeight
    error: Tensor | None = None
    count: int = 0


def _draft(weight: Tensor, config: LiquidConfig, name: str, moments: Moments | None) -> _Draft:
    method = layer_method(config, name, moments is not None)
    weight = weight.detach().float()
    if method == "int8":
        return _Draft(name, method, weight, int8_weight(weight))
    importance = None
    if moments is not None and method in ("hessian", "gptq"):
        weight = weight * (moments.hessian.diagonal() > 0)  # dead columns: as if they were zero
        importance = moments.importance(config.shrinkage)
        if not importance.any():
            importance = None
    rounding = "rtn" if method == "rtn" else "search"
    bits = layer_bits(config, name)
    base = quantize_weight(weight, config.group_of(bits), rounding, importance, bits)
    draft = _Draft(name, method, weight, base)
    if count := residual_columns(config, name, weight.shape[1]):
        draft.error = column_error(weight, dequantize_weight(base), importance)
        draft.count = count
    return draft


def _finished(
    draft: _Draft, columns: Tensor | None, config: LiquidConfig, moments: Moments | None
) -> tuple[QuantizedWeight, str]:
    name, method, weight, base = draft.name, draft.method, draft.weight, draft.base
    if method == "int8":
        return base, method
    if moments is not None and method == "gptq" and _FEW * moments.tokens < weight.shape[1]:
        warnings.warn(
            f"{name}: {moments.tokens} tokens are too few for {weight.shape[1]} columns: quantized "
            'with method "hessian" instead of "gptq"',
            stacklevel=2,
        )
        method = "hessian"
    if moments is not None and method == "gptq":
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
