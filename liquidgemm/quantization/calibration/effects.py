"""What a block leaves behind besides what it returns: in its arguments, and in its attributes.

A block may write to tensors that it is given, fill a dict that it shares with other blocks, or keep
a tensor in an attribute that the model reads. Where a block is answered from what it has given,
without being run, these have to come back as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

# What is left in arguments: by the index of the tensor, dict or list and, in the latter, the key.
Left = dict[tuple[int, Any], Any]
# Tensors in attributes, by path of the module and name.
Attributes = dict[tuple[str, str], Tensor]


def watch(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """What a call may write to, each with its present state."""
    return [
        (part, version(part) if isinstance(part, Tensor) else copy.copy(part))
        for part in _mutable((*args, *kwargs.values()))
    ]


def left_in(watched: list[tuple[Any, Any]]) -> Left:
    """What has been written to since."""
    found: Left = {}
    for index, (part, before) in enumerate(watched):
        if isinstance(part, Tensor):
            if version(part) != before:
                found[index, None] = part
            continue
        known = before if isinstance(part, Mapping) else dict(enumerate(before))
        items = part.items() if isinstance(part, Mapping) else enumerate(part)
        for key, value in items:
            if key not in known or known[key] is not value:
                found[index, key] = value
    return found


def leave_in(left: Left, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Write the same to the arguments of another run of that call."""
    parts = list(_mutable((*args, *kwargs.values())))
    for (index, key), value in left.items():
        part = parts[index]
        if isinstance(part, Tensor):
            part.copy_(value)
        elif isinstance(part, list):
            part[key : key + 1] = [value]
        else:
            part[key] = value


def attributes_of(module: nn.Module) -> Attributes:
    """Tensors that modules hold in plain attributes."""
    return {
        (path, name): value
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, Tensor)
    }


def version(tensor: Tensor) -> int:
    """A number that grows as the tensor is written to."""
    return 0 if tensor.is_inference() else tensor._version


def _mutable(value: Any) -> Iterator[Any]:
    """Tensors, dicts and lists in a value, in its order; a tuple holds them, but is none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MutableMapping | list | tuple):
        if not isinstance(value, tuple):
            yield value
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _mutable(item)


def is_mutation(func: Any) -> bool:
    """Whether an operation writes to one of its arguments."""
    return isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
