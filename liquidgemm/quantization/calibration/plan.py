"""What `quantize_` would do to each layer, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...formats.liquidquant import FINE_GROUP, padded
from ...nn._modules import linear_at
from ..config import LiquidConfig
from ..experts import Experts
from ..layer import layer_bits, layer_method, residual_columns
from .data import running
from .flow import Recordings
from .sites import check_pairs, find_sites
from .units import find_units


def plan(
    model: nn.Module,
    names: list[str],
    config: LiquidConfig,
    batches: list[Tensor | Mapping[str, Any]] | None = None,
    experts: Experts | None = None,
) -> dict[str, str]:
    """One line for each named layer, or for each part of some experts.

    Which layers the calibration data reaches is known if there is some: it is run through the
    float model, one batch of each kind. Without, all are taken to be reached. Smoothing is tried
    when it comes to it: only what leaves a block's function as it is is done. Pairs that are found
    by structure are not in the plan.

    Raises:
        ValueError: as of calibration before it starts.
    """
    units = find_units(model, names)
    check_pairs(model, units, config)
    reached = set(names) if batches is None else _reached(model, names, batches)
    smoothed: dict[str, str] = {}
    for unit in units if config.smooth else []:
        prefix = f"{unit.name}." if unit.name else ""
        for site in find_sites(model.get_submodule(unit.name), config):
            smoothed |= {prefix + linear: site.source for linear in site.linears}
    lines = {}
    for name in names:
        linear = linear_at(model, name)
        method = layer_method(config, name, has_data=name in reached)
        columns = padded(linear.in_features)
        own = config if experts is None else experts.config_of(name, config)
        bits = layer_bits(config, name)
        extra = residual_columns(own, name, linear.in_features)
        parts = [f"{linear.out_features} x {linear.in_features}", method]
        if extra:
            parts.append(f"{extra} residual columns")
        four = 4.5 if own.group_size == FINE_GROUP else 4.25
        stored = {4: four, 6: 6.25, 8: 8}[bits] * (columns + extra)
        parts.append(f"{stored / linear.in_features:.2f} bits per weight")
        if name not in reached:
            parts.append("not reached by the calibration data")
        elif name in smoothed:
            parts.append(f"smoothed by {smoothed[name]}")
        lines[name] = ", ".join(parts)
    return lines if experts is None else experts.fold_plan(lines)


def _reached(
    model: nn.Module, names: list[str], batches: list[Tensor | Mapping[str, Any]]
) -> set[str]:
    recordings = Recordings(model, find_units(model, names))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for number, batch in enumerate(batches):
            with running(model, batch, f"calibration: batch {number}"):
                recordings.of(batch)
    finally:
        for module in training:
            module.training = True
    return {name for recording in recordings.found.values() for name in recording.layers}
