"""Checkpoints of other projects, converted layer by layer while an engine loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...formats.liquidquant import FINE_GROUP
from ...importers import FORMATS, fp4, layers_of
from ...importers.settings import LayerSettings, Settings, merged
from ...importers.source import AnyWeight, fit, is_finer
from ...importers.wide import ByteWeight, FineWeight
from ...weights.weight import QuantizedWeight
from .layout import Packed, Slice, pack
from .summary import Summary
from .tensors import EngineLayer, EngineParameter

_SHARDS: dict[int | str | None, int] = {None: 0, "q": 0, "k": 1, "v": 2}
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
        why = "the 4-bit grid cannot hold it, or what its tensors mean is not known"
        if method in _IN_8_BITS:
            why = "it needs 8 bits here: convert the checkpoint before by `liquidgemm import`"
        # mxfp4 is refused below, by the layout of its codes.
        known = ", ".join(name for name in formats if name != "mxfp4")
        raise ValueError(
            f"quant_method: expected one of {known} to convert while loading, got {method!r}: {why}"
        )
    module: ModuleType = FORMATS[method]
    settings = merged(files, module.SYNONYMS, module.HARMLESS)
    settings.pop("quant_method", None)
    found = layers_of(module, sorted(names), module.scheme(Settings(settings)))
    for layer in found:
        if layer.settings.layout in fp4.SPANS:
            raise ValueError(
                f"{layer.name}: expected integer codes, got {layer.settings.layout}: floats of 4 "
                "bits need 8 bits here: convert the checkpoint before by `liquidgemm import`"
            )
        span = layer.settings.group_size or -1
        if span != -1 and span % FINE_GROUP:
            raise _too_fine(span)
    return {layer.name: ForeignLayer(method, layer.keys, layer.settings) for layer in found}


def _too_fine(span: int) -> ValueError:
    return ValueError(
        f"group_size: expected a multiple of {FINE_GROUP} or a whole row, got {span}: finer groups "
        "than the format's need 8 bits, or a new search: convert the checkpoint before by "
        "`liquidgemm import`"
    )


def convert(weight: AnyWeight, rows: Tensor | None = None) -> tuple[QuantizedWeight, float]:
    """Some rows of a weight, int64 ``[n]``, on our grid, and how far that is (`fit`).

    Raises:
        ValueError: its groups are finer than 32 columns.
    """
    if isinstance(weight, FineWeight) or is_finer(weight, FINE_GROUP):
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


class Collector:
    """The tensors of a linear layer, whole and as they are on the disk, until all are there.

    Then they are converted, and what this GPU has of the result is packed. So a slice is that of
    the whole layer's conversion, whatever the size of tensor parallelism.

    Args:
        layers: of the checkpoint, by name, in the order in which the engine stacks them.
        rows: of the engine's layer on this GPU.
        part: its columns on this GPU.
        rows_of: which rows of one of the layers, of which there are as many as its tensor of
            numbers has, this GPU has, as the engine's own loader says by loading these numbers
            into a float's place, int64 ``[rows]``; -1 where it loads nothing.
        packed: what takes the result.
    """

    def __init__(
        self,
        layers: Mapping[str, ForeignLayer],
        summary: Summary,
        rows: int,
        part: Slice,
        rows_of: Callable[[Tensor, Tensor, tuple[int | str, ...]], None],
        packed: Callable[[Packed], None],
    ) -> None:
        self.layers, self.summary, self.part = layers, summary, part
        self.rows, self.rows_of, self.packed = rows, rows_of, packed
        self.device = torch.get_default_device()
        self.tensors: list[dict[str, Tensor]] = [{} for _ in layers]
        self.shards: list[tuple[int | str, ...]] = [() for _ in layers]
        self.keys = sorted({key for own in layers.values() for key in own.keys} - {"bias"})

    def register(self, layer: EngineLayer) -> None:
        """Empty parameters: places by whose names an engine finds what loads into them."""
        for key in self.keys:
            place: EngineParameter = nn.Parameter(
                torch.empty(0, dtype=torch.uint8), requires_grad=False
            )
            place.weight_loader = self._loader(layer, key)
            layer.register_parameter(key, place)

    def check_complete(self, layer: EngineLayer) -> None:
        """Raises a ValueError that names a tensor which has not been loaded."""
        if "scale" in layer._parameters:
            return
        for (name, own), held in zip(self.layers.items(), self.tensors, strict=True):
            if missing := sorted(set(own.keys) - held.keys() - {"bias"}):
                raise ValueError(f"{name}.{missing[0]}: expected it to be loaded, got nothing")

    def _loader(self, layer: EngineLayer, key: str) -> Callable[..., None]:
        def collect(param: Tensor, loaded: Tensor, shard: int | str | None = None) -> None:
            index = shard if isinstance(shard, int) else _SHARDS[shard]
            if "scale" in layer._parameters:
                raise RuntimeError(
                    f"{tuple(self.layers)[index]}.{key}: it is converted already: weights of a "
                    "checkpoint that is converted while loading cannot be loaded again; run "
                    "`liquidgemm import` and serve its output"
                )
            self.shards[index] = () if shard is None else (shard,)
            self.tensors[index][key] = loaded.detach().clone()  # the loader may reuse its memory
            if all(
                held.keys() >= set(own.keys) - {"bias"}
                for held, own in zip(self.tensors, self.layers.values(), strict=True)
            ):
                self._convert(layer)

        return collect

    def _convert(self, layer: EngineLayer) -> None:
        weights: list[QuantizedWeight] = []
        for (name, own), tensors, shard in zip(
            self.layers.items(), self.tensors, self.shards, strict=True
        ):
            try:
                source = own.read({key: t.to(self.device) for key, t in tensors.items()})
                rows = self._own_rows(source.shape[0], shard)
                weight, error = convert(source, (rows - 1).clamp(min=0))
            except (ValueError, RuntimeError) as problem:
                raise ValueError(f"{name}: {problem}") from None
            self.summary.imported(name, error)
            # Engines fill up vocabularies.
            weights.append(replace(weight, scale=torch.where(rows > 0, weight.scale, 0)))
            tensors.clear()
        packed = pack(
            self._stacked(weights),
            torch.cat([weight.scale for weight in weights]),
            [weight.out_features for weight in weights],
            [self.part.of_columns(_columns(weight)) for weight in weights],
            self.part,
        )
        for key in self.keys:
            layer._parameters.pop(key, None)
        self.packed(packed)

    def _own_rows(self, count: int, shard: tuple[int | str, ...]) -> Tensor:
        """Which rows of a whole layer this GPU has, from 1 on, and 0 for one that fills up."""
        place = torch.full((self.rows,), -1, device=self.device)
        self.rows_of(place, torch.arange(1, count + 1, device=self.device), shard)
        return place[place >= 0]

    def _stacked(self, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of all of them, those of the narrower ones filled up."""

        def stacked(name: str) -> Tensor:
            own = [self.part.of_codes(getattr(w, name), w.augment) for w in weights]
            width = max(tensor.shape[1] for tensor in own)
            return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in own])

        return stacked("qweight"), stacked("qscale"), stacked("qoffset")


def _columns(weight: QuantizedWeight) -> Tensor:
    if weight.columns is None:
        return torch.empty(0, dtype=torch.int32, device=weight.scale.device)
    return weight.columns
