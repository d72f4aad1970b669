"""Experts that a checkpoint keeps in stacked tensors, seen as layers of single experts.

A tensor of all experts of a layer, with them along its first axis, has one of two names:

    model.layers.0.mlp.experts.gate_up_proj.weight_packed       a layer's tensor, stacked
    model.layers.0.mlp.experts.gate_up_proj_blocks              a parameter of the experts

Both stand here for ``model.layers.0.mlp.experts.<number>.gate_up_proj.<key>``, so that formats
read experts as they read other layers, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .experts import PARTS

_STACKED = re.compile(rf"^((?:.*\.)?experts)\.({'|'.join(PARTS)})([._])([^.]+)$")


class Tensors(Protocol):
    """Tensors by name, of which parts can be read."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> list[int]: ...
    def part(self, name: str, index: int) -> Tensor: ...
    def __getitem__(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Part:
    name: str
    index: int | None  # along the first axis; None for a tensor that all experts share


class Unstacked:
    """The tensors of a checkpoint, those of stacked experts by the names of single experts.

    Args:
        source: the tensors.
        marks: keys by which a layer is known to be quantized; other experts stay as they are.

    Raises:
        ValueError: the tensors of some experts do not have as many of them.
    """

    def __init__(self, source: Tensors, marks: Set[str]) -> None:
        self._source = source
        self._parts: dict[str, _Part] = {}
        stacks: dict[tuple[str, str], dict[str, str]] = {}
        for name in source.names():
            if match := _STACKED.match(name):
                prefix, part, joint, key = match.groups()
                if joint == "_" and f"weight_{key}" in marks:
                    key = f"weight_{key}"
                stacks.setdefault((prefix, part), {})[key] = name
        self._stacked: set[str] = set()
        for (prefix, part), names in stacks.items():
            if marks & names.keys():
                self._add(prefix, part, names)

    def _add(self, prefix: str, part: str, names: dict[str, str]) -> None:
        # All experts may share the shape of their weight.
        shapes = {key: self._source.shape(name) for key, name in names.items()}
        shared = {key for key, shape in shapes.items() if key == "weight_shape" and shape == [2]}
        sizes = {names[key]: shape[:1] for key, shape in shapes.items() if key not in shared}
        first, experts = next(iter(sizes.items()))
        for name, size in sizes.items():
            if size != experts or not size:
                raise ValueError(
                    f"{name}: expected experts along its first axis, as many as in {first}, got "
                    f"{size} and {experts}"
                )
        for key, name in names.items():
            self._stacked.add(name)
            for e in range(experts[0]):
                index = None if key in shared else e
                self._parts[f"{prefix}.{e}.{part}.{key}"] = _Part(name, index)

    def names(self) -> list[str]:
        whole = (name for name in self._source.names() if name not in self._stacked)
        return sorted((*whole, *self._parts))

    def __getitem__(self, name: str) -> Tensor:
        if (found := self._parts.get(name)) is None:
            return self._source[name]
        if found.index is None:
            return self._source[found.name]
        return self._source.part(found.name, found.index)
