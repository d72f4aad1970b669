"""compressed-tensors, format ``pack-quantized``, 4 bits (vllm-project/compressed-tensors).

Per layer: ``weight_packed`` int32 ``[N, ceil(K / 8)]``, codes + 8, the first of eight columns in
the low nibble; ``weight_scale`` float ``[N, G]``; ``weight_shape`` ``[2]``; if asymmetric,
``weight_zero_point`` int32 ``[ceil(N / 8), G]``, packed likewise along the rows;
``weight_g_idx`` ``[K]`` if columns were put into groups out of order.
``W = scale * (code - zero)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import ceil_div
from .bits import FLOATS, WORDS, expect, expect_matrix, in_order, unpack_words
from .source import SourceWeight

REQUIRED = frozenset({"weight_packed", "weight_scale", "weight_shape"})
OPTIONAL = frozenset({"weight_zero_point", "weight_g_idx", "bias"})


def read(tensors: dict[str, Tensor], settings: dict) -> SourceWeight:
    if settings.get("format", "pack-quantized") != "pack-quantized":
        raise ValueError(f"format: expected 'pack-quantized', got {settings['format']!r}")
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    expect_matrix("weight_packed", packed)
    expect_matrix("weight_scale", scale)
    expect("weight_shape", tensors["weight_shape"], (torch.int64, torch.int32), [2])
    n, k = (int(size) for size in tensors["weight_shape"])
    if list(packed.shape) == [n, ceil_div(k, 4)]:
        raise ValueError("weight_packed: expected 4 bits per weight, got 8")
    expect("weight_packed", packed, WORDS, [n, ceil_div(k, 8)])
    groups = scale.shape[1]
    expect("weight_scale", scale, FLOATS, [n, groups])
    if k % groups:
        raise ValueError(f"weight_scale: expected groups that divide {k} columns, got {groups}")
    in_order("weight_g_idx", tensors.get("weight_g_idx"), k, k // groups)
    zero = tensors.get("weight_zero_point")
    if zero is None:
        zero = torch.full((n, groups), 8)
    else:
        expect("weight_zero_point", zero, WORDS, [ceil_div(n, 8), groups])
        zero = unpack_words(zero, dim=0)[:n]
    step = scale.double()
    codes = unpack_words(packed, dim=1)[:, :k]
    return SourceWeight(codes, step, -zero.double() * step, k // groups, bias=tensors.get("bias"))
