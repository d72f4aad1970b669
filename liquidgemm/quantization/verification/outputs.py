"""Samples of what a model gives, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

_VALUES = 1 << 14  # values per output that are kept


def values_of(
    output: Any, name: str = "", first: bool = False, finite: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """A sample of each float tensor in an output, with a name, in float32 on the CPU."""
    leaves, _ = tree_flatten_with_path(_plain(output))
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            continue
        flat = leaf.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _VALUES)].float().cpu()
        if sample.data_ptr() == leaf.data_ptr():
            sample = sample.clone()  # the model may write to what a block has given
        if finite and not sample.isfinite().any():
            continue
        keys = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
        yield name if first else (keys or "output"), sample
        if first:
            return


def _plain(output: Any) -> Any:
    """Without caches and other objects of which nothing is known."""
    if isinstance(output, Mapping):
        return {str(key): _plain(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    return output if isinstance(output, Tensor) else None


def distance_of(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` where expected is finite; infinite if actual is not."""
    usable = expected.isfinite()
    actual, expected = actual[usable].double(), expected[usable].double()
    if not actual.isfinite().all():
        return math.inf
    norm, off = expected.norm().item(), (actual - expected).norm().item()
    return off / norm if norm > 0 else (0.0 if off == 0 else math.inf)
