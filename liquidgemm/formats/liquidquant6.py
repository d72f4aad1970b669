"""6-bit weights: the grids of `liquidquant` with codes 0 to 63, ``w8 = q * s + a - 128``.

A checkpoint holds them in the tensors of `liquidquant`, all columns of which are stored twice: the
upper four bits of a code, and in residual columns the lower two. Every such weight is a 6-bit
weight; the kernels read codes of six bits ``[ceil(N / 64), K / 64, 3200]``, without residual
columns.

========  =============================  ==============================
tensor    columns 0 to K - 1             residual columns
========  =============================  ==============================
qweight   q >> 2                         q & 3
qscale    4 s                            s
qoffset   a                              128: ``lo = 0``
columns                                  0, 1, 2, ..., the last feature again where K is padded
========  =============================  ==============================
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8 import stored_twice
from .liquidquant import (
    BLOCK_BYTES_6,
    GROUP,
    pack_codes,
    pack_nibbles,
    unpack_codes,
    unpack_nibbles,
)

Q_MAX = 63
"""Largest code."""

_NO_OFFSET = 128  # of the lower bits: lo = 0


def is_packed(packed: Tensor) -> bool:
    """Whether a packed weight is of this format."""
    return packed.shape[-1] == BLOCK_BYTES_6


def from_codes(q: Tensor, qscale: Tensor, qoffset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a checkpoint.

    Args:
        q: uint8 ``[N, K]``, codes; K a multiple of 64.
        qscale, qoffset: uint8 ``[N, K / 64]``, s and a of each group.
    """
    none = torch.full_like(qoffset, _NO_OFFSET)
    return (
        torch.cat((pack_nibbles(q >> 2), pack_nibbles(q & 3)), 1),
        torch.cat((4 * qscale, qscale), 1),
        torch.cat((qoffset, none), 1),
    )


def to_codes(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `from_codes`, of a 6-bit weight."""
    upper, lower = (unpack_nibbles(half) for half in qweight.chunk(2, 1))
    return upper << 2 | lower, qscale.chunk(2, 1)[1], qoffset.chunk(2, 1)[0]


def to_kernel(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack_weight` takes for a 6-bit weight."""
    q, s, a = to_codes(qweight, qscale, qoffset)
    return pack_codes(q, 6), s, a


def from_kernel(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `to_kernel`."""
    return from_codes(unpack_codes(qweight, 6), qscale, qoffset)


def is_six_bits(
    qweight: Tensor, qscale: Tensor, qoffset: Tensor, columns: Tensor | None, in_features: int
) -> bool:
    """Whether these tensors, K padded to whole groups, are a 6-bit weight; unknown is no."""
    if not stored_twice(qweight, qscale, qoffset, columns, in_features):
        return False
    upper, lower = qscale.chunk(2, 1)
    if not torch.equal(upper.int(), 4 * lower.int()):
        return False
    codes = qweight.chunk(2, 1)[1]
    if (qoffset.chunk(2, 1)[1] != _NO_OFFSET).any() or (codes & 0xCC).any():
        return False
    # Sums that fit no byte are none of one code, but those of two columns may be so.
    q, s, a = to_codes(qweight, qscale, qoffset)
    largest = q.unflatten(1, (-1, GROUP)).amax(2).int()
    return bool((largest * s.int() + a.int() <= 255).all())
