"""Settings of a checkpoint by what they mean: each is understood, harmless, or refused.

A format reads every setting that changes its weights with `Settings.take`, and names those that
change nothing with `Settings.harmless`. `Settings.close` refuses what is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_EMPTY: tuple[object, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class LayerSettings:
    """How the settings say that one layer is stored; None where they do not say.

    Attributes:
        layout: the arrangement of its tensors, by the format's own name.
        bits: of a code.
        group_size: columns that share a scale, -1 for a whole row.
        symmetric: whether the zero is the middle of the codes.
        ordered: False if the columns were put into groups by something else than their order.
        note: what else the settings say of it, for the report.
    """

    layout: str
    bits: int = 4
    group_size: int | None = None
    symmetric: bool | None = None
    ordered: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class SourceLayer:
    """A quantized layer: its name in the checkpoint and in the model, and its tensors' keys."""

    name: str
    module: str
    keys: tuple[str, ...]
    settings: LayerSettings


LayerScheme = Callable[[str, str], LayerSettings]
"""The settings of a layer by its name in the checkpoint and its name in the model."""


def harmless(reasons: Mapping[str, str]) -> frozenset[str]:
    """The keys of settings that change nothing, by the reason for that, parted by spaces."""
    return frozenset(key for keys in reasons.values() for key in keys.split())


class Settings:
    """An object of settings, of which every key has to be accounted for.

    Args:
        values: the object.
        path: where it lies, for messages: ``"config_groups.group_0."``.

    Raises:
        ValueError: it is no object.
    """

    def __init__(self, values: object, path: str = "") -> None:
        if not isinstance(values, dict):
            raise ValueError(
                f"{path.removesuffix('.') or 'quantization_config'}: expected an object, "
                f"got {type(values).__name__}"
            )
        self.path = path
        self._values: dict[str, Any] = values
        self._left = set(values)

    def take(self, key: str, default: object = None) -> Any:
        """The value of a key, or the default where it is null or missing."""
        self._left.discard(key)
        value = self._values.get(key)
        return default if value is None else value

    def choice(self, key: str, allowed: Iterable[object], default: object = None) -> Any:
        """As `take`; any case of a string. Raises a ValueError for what is not allowed."""
        value = _plain(self.take(key, default))
        allowed = tuple(allowed)
        # The types too: True is no number of bits.
        if value is not None and not any(
            type(value) is type(a) and value == a for a in allowed if a is not None
        ):
            names = ", ".join(repr(a) for a in allowed if a is not None)
            raise ValueError(f"{self.path}{key}: expected {names}, got {value!r}")
        return value

    def flag(self, key: str) -> bool | None:
        return self.choice(key, (True, False))

    def group_size(self, key: str = "group_size") -> int | None:
        span = self.take(key)
        if span is not None and (type(span) is not int or (span < 1 and span != -1)):
            raise ValueError(f"{self.path}{key}: expected a positive number or -1, got {span!r}")
        return span

    def names(self, key: str) -> list[str]:
        """A list of names, or of lists of them."""
        value = self.take(key, [])
        flat: list[Any] = []
        for item in value if isinstance(value, list | tuple) else [value]:
            flat += item if isinstance(item, list | tuple) else [item]
        if not all(isinstance(name, str) for name in flat):
            raise ValueError(f"{self.path}{key}: expected a list of names, got {value!r}")
        return flat

    def objects(self, key: str) -> dict[str, Settings]:
        """An object of objects."""
        value = self.take(key, {})
        whole = Settings(value, f"{self.path}{key}.")
        return {
            name: Settings(entry, f"{self.path}{key}.{name}.")
            for name, entry in whole._values.items()
        }

    def harmless(self, keys: Iterable[str]) -> None:
        """Accounts for keys that change nothing, whatever their values."""
        self._left -= set(keys)

    def close(self) -> None:
        """Raises a ValueError for a key that nothing has asked for, unless it is empty."""
        for key in sorted(self._left):
            if not any(
                type(self._values[key]) is type(e) and self._values[key] == e for e in _EMPTY
            ):
                raise ValueError(
                    f"{self.path}{key}: expected no such setting, got {_short(self._values[key])}: "
                    "what it means is not known here, and a weight may depend on it"
                )


def _plain(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def merged(
    sources: Mapping[str, dict], synonyms: Mapping[str, str], harmless: frozenset[str]
) -> dict:
    """One object of the settings in several files, by file.

    Raises:
        ValueError: two files have different values for a setting that is not harmless.
    """
    result: dict[str, object] = {}
    origin: dict[str, str] = {}
    for file, settings in sources.items():
        for name, value in settings.items():
            key = synonyms.get(name, name)
            if value is None:
                continue
            if key in result and _plain(result[key]) != _plain(value) and key not in harmless:
                raise ValueError(
                    f"{name}: expected one value, got {_short(result[key])} in {origin[key]} and "
                    f"{_short(value)} in {file}"
                )
            if key not in result:
                result[key], origin[key] = value, file
    return result


def matched(pattern: str, names: Iterable[str]) -> bool:
    """Whether a name is the pattern, or starts as a regular expression says: ``"re:..."``."""
    if not pattern.startswith("re:"):
        return pattern in names
    return starts(pattern.removeprefix("re:"), names)


def starts(expression: str, names: Iterable[str]) -> bool:
    """Whether a regular expression fits the start of a name."""
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r}: expected a regular expression ({error})") from None
    return any(compiled.match(name) for name in names)


def part_of(part: str, name: str) -> bool:
    """Whether a dotted name holds another one whole: ``"lm_head"`` or ``"mlp.gate"``."""
    return f".{part}." in f".{name}."


def not_quantized(key: str, entry: str, layer: str) -> ValueError:
    """The error for a layer that the settings keep in float and the tensors do not."""
    return ValueError(
        f"{key}: expected a layer that is not quantized, as {entry!r} says, got the tensors of a "
        f"quantized one in {layer}"
    )


def no_override(dynamic: Iterable[str], layer: str, module: str) -> None:
    """Raises a ValueError if one of GPTQModel's patterns of exceptions is for the layer."""
    for pattern in dynamic:
        if starts(pattern.removeprefix("-:").removeprefix("+:"), (layer, module)):
            raise ValueError(f"dynamic: expected no exception for {layer}, got {pattern!r}")
