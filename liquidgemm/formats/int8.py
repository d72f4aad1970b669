"""INT8 weights: one byte per weight and one float scale per row, ``W = scale * w8``.

A checkpoint holds them in the tensors of `liquidquant`, all columns of which are stored twice: the
upper four bits, and in residual columns the lower four. Every such weight is an INT8 weight; the
kernels read it as bytes ``[ceil(N / 64), K / 64, 4096]``, without residual columns.

========  =============================  ==============================
tensor    columns 0 to K - 1             residual columns
========  =============================  ==============================
qweight   u >> 4                         u & 15, of ``u = w8 + 128``
qscale    16                             1
qoffset   0: ``lo = -128``               128: ``lo = 0``
columns                                  0, 1, 2, ..., the last feature again where K is padded
========  =============================  ==============================
"""

from __future__ import annotations

import torch
from torch import Tensor

from .liquidquant import GROUP, PANEL, pack_nibbles, padded, unpack_nibbles

BLOCK_BYTES = PANEL * GROUP
"""Bytes of one packed block."""

_STEPS, _OFFSETS = (16, 1), (0, 128)  # of the upper bits and of the lower ones


def is_packed(packed: Tensor) -> bool:
    """Whether a packed weight is of this format."""
    return packed.shape[-1] == BLOCK_BYTES


def columns_of(in_features: int, device: torch.device | str | None = None) -> Tensor:
    """int32 ``[K]``, K padded: the residual columns of an INT8 weight."""
    every = torch.arange(padded(in_features), dtype=torch.int32, device=device)
    return every.clamp_(max=in_features - 1)


def logical_of(w8: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, qscale and qoffset of an int8 weight ``[N, K]``, K a multiple of 64."""
    u = w8.view(torch.uint8) ^ 0x80
    n, groups = len(u), u.shape[1] // GROUP
    qscale, qoffset = (
        torch.tensor(grid, dtype=torch.uint8, device=u.device)
        .repeat_interleave(groups)
        .repeat(n, 1)
        for grid in (_STEPS, _OFFSETS)
    )
    return torch.cat((pack_nibbles(u >> 4), pack_nibbles(u & 15)), 1), qscale, qoffset


def stored_twice(
    qweight: Tensor, qscale: Tensor, qoffset: Tensor, columns: Tensor | None, in_features: int
) -> bool:
    """Whether these tensors hold all columns twice, K padded, as weights of more than 4 bits do;
    unknown is no."""
    width = padded(in_features)
    if columns is None or len(columns) != width or qweight.shape[1] != width:
        return False
    if qscale.shape[1] * GROUP != 2 * width:
        return False
    if any(tensor.is_meta for tensor in (qweight, qscale, qoffset, columns)):
        return False
    if not torch.equal(columns, columns_of(in_features, columns.device)):
        return False
    # Columns past K repeat the last feature, so a code there would change the product.
    last = qweight[:, (width + in_features) // 2 :]
    return not unpack_nibbles(last)[:, in_features % 2 :].any()


def is_int8(
    qweight: Tensor, qscale: Tensor, qoffset: Tensor, columns: Tensor | None, in_features: int
) -> bool:
    """Whether these tensors, K padded to whole groups, are an INT8 weight; unknown is no."""
    if not stored_twice(qweight, qscale, qoffset, columns, in_features):
        return False
    for tensor, grid in ((qscale, _STEPS), (qoffset, _OFFSETS)):
        halves = tensor.chunk(2, 1)
        if any((half != value).any() for half, value in zip(halves, grid, strict=True)):
            return False
    return True


def bytes_of(qweight: Tensor) -> Tensor:
    """int8 ``[N, K]``, K padded: of an INT8 weight."""
    upper, lower = (unpack_nibbles(half) for half in qweight.chunk(2, 1))
    return ((upper << 4 | lower) ^ 0x80).view(torch.int8)
