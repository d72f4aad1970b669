"""The layers of a checkpoint by the names that an engine has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


def parts_of(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of the layers that an engine computes as one: ``fused`` by its last part."""
    parent, dot, last = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in fused.get(last, [last])]


@dataclass(frozen=True)
class Names(Generic[Value]):
    """Layers of a checkpoint, each with what is known of it."""

    layers: Mapping[str, Value]

    def of(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> dict[str, Value]:
        """The layers that the engine's layer is made of, in its order; {} if it is not quantized.

        Raises:
            ValueError: some of them are quantized and others not.
        """
        if (own := self._find(prefix)) is not None:  # fused in the checkpoint already
            return {own: self.layers[own]}
        parts = parts_of(prefix, fused)
        found = [self._find(part) for part in parts]
        missing = [part for part, name in zip(parts, found, strict=True) if name is None]
        if len(missing) == len(parts):
            return {}
        if missing:
            raise ValueError(
                f"{prefix}: expected all of {', '.join(parts)} quantized or none, as the engine "
                f"computes them at once, got {', '.join(missing)} in floats: quantize with "
                "patterns of skip that match all of them or none"
            )
        return {name: self.layers[name] for name in found if name is not None}

    def _find(self, name: str) -> str | None:
        """A checkpoint of a base model lacks the prefix of the model with a head, or has it."""
        names = (name, name.removeprefix("model."), f"model.{name}")
        return next((name for name in names if name in self.layers), None)
