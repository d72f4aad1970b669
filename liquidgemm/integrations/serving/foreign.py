"""Checkpoints of other projects, converted layer by layer while an engine loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ...formats.liquidquant import GROUP
from ...importers import FORMATS, layers_of
from ...importers.settings import LayerSettings, Settings, merged
from ...importers.source import AnyWeight, SourceWeight, fit
from ...importers.wide import ByteWeight, FineWeight
from ...weights.weight import QuantizedWeight

# What has no grid that 4 bits come near to without a new search.
_IN_8_BITS = ("bitsandbytes",)


@dataclass(frozen=True)
class ForeignLayer:
    """A layer of another project's checkpoint: what reads it, its tensors and settings."""

    format: str
    keys: tuple[str, ...]
    settings: LayerSettings

    def read(self, tensors: Mapping[str, Tensor]) -> AnyWeight:
        """The whole weight, on the device of its tensors.

        Raises:
            ValueError: a tensor that does not fit.
        """
        device = next(iter(tensors.values())).device
        with torch.device(device):  # for what is made beside them
            return FORMATS[self.format].read(dict(tensors), self.settings)


def foreign_layers(files: Mapping[str, dict], names: Iterable[str]) -> dict[str, ForeignLayer]:
    """The quantized layers of a checkpoint by name.

    Args:
        files: its settings, by the file in which they are; one of them has ``quant_method``.
        names: of all its tensors.

    Raises:
        ValueError: a format, a setting or a tensor that is not understood, or that our grid cannot
            hold.
    """
    methods = {settings.get("quant_method") for settings in files.values()} - {None}
    method = methods.pop() if len(methods) == 1 else None
    formats = [name for name in FORMATS if name not in _IN_8_BITS]
    if method not in formats:
        raise ValueError(
            f"quant_method: expected one of {', '.join(formats)} to convert while loading, got "
            f"{method!r}: the 4-bit grid cannot hold it, or what its tensors mean is not known"
        )
    module: ModuleType = FORMATS[method]
    settings = merged(files, module.SYNONYMS, module.HARMLESS)
    settings.pop("quant_method", None)
    found = layers_of(module, sorted(names), module.scheme(Settings(settings)))
    for layer in found:
        span = layer.settings.group_size or -1
        if span != -1 and span % GROUP:
            raise _too_fine(span)
    return {layer.name: ForeignLayer(method, layer.keys, layer.settings) for layer in found}


def _too_fine(span: int) -> ValueError:
    return ValueError(
        f"group_size: expected a multiple of {GROUP} or a whole row, got {span}: finer groups than "
        "the format's need 8 bits, or a new search: convert the checkpoint before by `liquidgemm "
        "import`"
    )


def convert(weight: AnyWeight, rows: Tensor | None = None) -> tuple[QuantizedWeight, float]:
    """Some rows of a weight, int64 ``[n]``, on our grid, and how far that is (`fit`).

    Raises:
        ValueError: its groups are finer than 64 columns.
    """
    if isinstance(weight, FineWeight) or (isinstance(weight, SourceWeight) and weight.is_fine):
        raise _too_fine(weight.span)
    if rows is not None:
        if isinstance(weight, ByteWeight):
            names: tuple[str, ...] = ("codes", "zero", "scale", "bias")
        else:
            names = ("codes", "step", "offset", "sigma", "bias")
        parts = {n: v[rows] for n in names if (v := getattr(weight, n)) is not None}
        weight = replace(weight, **parts)
    with torch.device(weight.codes.device):
        return fit(weight)
