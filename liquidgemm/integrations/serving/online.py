"""What becomes of the layers of a float checkpoint that an engine quantizes while it loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...nn._modules import matches
from ...quantization.config import LiquidConfig
from ...quantization.layer import layer_bits, layer_method, quantize_layer, residual_columns
from ...quantization.selection import FEW_ROWS
from .layout import Packed, Slice, pack

# Names of layers that choose experts, some of which have that many rows.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def check_online(config: LiquidConfig) -> None:
    """Raises a ValueError if a config needs more than one layer's weight at a time."""
    if config.budget is not None:
        raise ValueError(
            f"budget: expected None to quantize while loading, got {config.budget!r}: it is met by "
            "what layers do to the output of the model; run `liquidgemm quantize --budget` and "
            "serve its output, or give the bits of layers by patterns"
        )
    for name in ("smooth", "rotate", "rotate_heads"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: expected False to quantize while loading, got {getattr(config, name)!r}: "
                "it changes several layers at once; run `liquidgemm quantize` and serve its output"
            )
    if config.needs_calibration:
        raise ValueError(
            f"method: expected 'search' or 'rtn' to quantize while loading, got {config}: run "
            "`liquidgemm quantize` with the text to calibrate on, and serve its output"
        )


def check_experts(config: LiquidConfig, name: str) -> None:
    """Raises a ValueError if a config gives experts more than 4 bits."""
    if (bits := layer_bits(replace(config, keep=()), name)) != 4:
        raise ValueError(
            f"bits: expected 4 for {name}, as experts have 4-bit codes alone, got {bits}: put a "
            "pattern for them first"
        )


def skipped(config: LiquidConfig, name: str) -> str | None:
    """Why a config leaves a layer in floats, if it does."""
    pattern = next((pattern for pattern in config.skip if matches(name, pattern)), None)
    return None if pattern is None else f"matches the pattern {pattern!r}"


def left_in_floats(
    config: LiquidConfig, prefix: str, names: Sequence[str], rows: int, columns: int
) -> str | None:
    """Why a linear layer of an engine stays in floats, if it does.

    Args:
        prefix: its name.
        names: of the layers of the checkpoint that it is made of.
        rows, columns: of the whole weight.

    Raises:
        ValueError: the config treats some of them otherwise than others.
    """
    if prefix.rpartition(".")[2] in _ROUTERS:
        return "it chooses experts"
    if rows < FEW_ROWS:
        return f"fewer than {FEW_ROWS} rows"
    treatments = {
        name: skipped(config, name) or _treatment(config, name, columns) for name in names
    }
    if len(set(treatments.values())) > 1:
        raise ValueError(
            f"{prefix}: expected {', '.join(names)} to be treated alike, as the engine computes "
            f"them at once, got {treatments}: use patterns of skip, keep, bits and augment that "
            "match all of them or none"
        )
    return skipped(config, names[0])


def _treatment(config: LiquidConfig, name: str, in_features: int) -> str:
    """What becomes of a layer, so that those which are computed at once can be compared."""
    augment = residual_columns(config, name, in_features)
    bits = layer_bits(config, name)
    return f"{layer_method(config, name, False)}, {bits} bits, {augment} residual columns"


def quantized(weight: Tensor, config: LiquidConfig, names: Sequence[str]) -> Packed:
    """A float weight ``[N, K]`` of layers that an engine computes at once, without data.

    Raises:
        ValueError: as `quantize_layer`; the message names the layers.
    """
    try:
        found, _ = quantize_layer(weight, config, names[0])
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from None
    columns = [] if found.columns is None else [found.columns]
    part = Slice(0, found.in_features, found.in_features)
    codes = found.qweight, found.qscale, found.qoffset
    return pack(codes, found.scale, [len(found.scale)], columns, part)
