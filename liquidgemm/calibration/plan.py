"""What `quantize_` would do to each layer, in words."""

from __future__ import annotations

from torch import nn

from ..config import LiquidConfig
from ..format import padded
from .blocks import find_blocks
from .layer import layer_method, residual_columns
from .smooth import find_sites


def plan(model: nn.Module, names: list[str], config: LiquidConfig) -> dict[str, str]:
    """One line for each named layer.

    Smoothing is tried when it comes to it: only what leaves a block's function as it is is done.
    """
    smoothed = {}
    for block in find_blocks(model, names) if config.smooth else []:
        prefix = f"{block}." if block else ""
        for site in find_sites(model.get_submodule(block), config):
            smoothed |= {prefix + linear: site.source for linear in site.linears}
    lines = {}
    for name in names:
        linear = model.get_submodule(name)
        method = layer_method(config, name, has_data=True)
        columns = padded(linear.in_features)
        extra = columns if method == "int8" else residual_columns(config, name, linear.in_features)
        parts = [f"{linear.out_features} x {linear.in_features}", method]
        if extra:
            parts.append(f"{extra} residual columns")
        parts.append(f"{4.25 * (columns + extra) / linear.in_features:.2f} bits per weight")
        if name in smoothed:
            parts.append(f"smoothed by {smoothed[name]}")
        lines[name] = ", ".join(parts)
    return lines
