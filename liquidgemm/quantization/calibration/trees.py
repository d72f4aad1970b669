"""What modules take and return: tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif _is_record(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The value with each tensor changed; what holds no tensors is passed on as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if _is_record(value):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{n: map_tensors(getattr(value, n), change) for n in names})
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        if type(value) is dict:
            return items
        changed: Any = copy.copy(value)
        changed.update(items)
        return changed
    if isinstance(value, tuple | list):
        kind: Any = type(value)
        changed = [map_tensors(item, change) for item in value]
        return kind(*changed) if hasattr(value, "_fields") else kind(changed)
    return value


def without_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without those in which a block would find what it was given before."""
    return {key: value for key, value in kwargs.items() if "Cache" not in type(value).__name__}


def _is_record(value: Any) -> bool:
    """An instance of a dataclass; the outputs of transformers are such."""
    return is_dataclass(value) and not isinstance(value, type)
