"""The LiquidQuant number format in its logical layout (arXiv 2509.01229).

A weight ``W`` of shape ``[N, K]`` (``[out_features, in_features]``) is kept as four tensors, in
groups of G = 64 columns, or of 32 with codes of 4 bits. K is a multiple of 64 here: a shorter last
group is padded, and the columns past ``in_features`` only ever meet zero activations.

========  =======  ============  ==============================================================
tensor    dtype    shape         meaning
========  =======  ============  ==============================================================
qweight   uint8    [N, K / 2]    q in 0..15; byte j of a row holds column 2j in its low nibble
                                 and column 2j + 1 in its high nibble
   or     uint8    [N, 3 K / 4]  q in 0..63; the codes of a row one after the other in its bits,
                                 from the lowest ones of byte 0 on: four codes to three bytes
qscale    uint8    [N, K / G]    integer step s of a group
qoffset   uint8    [N, K / G]    a = lo + 128, the offset of a group
scale     float32  [N]           sigma, the size of one INT8 step of a row
========  =======  ============  ==============================================================

A group decodes to INT8 as ``w8 = int8((q * s + a) XOR 0x80)``, which is ``q * s + a - 128``, in
unsigned byte arithmetic. The group is *feasible* if ``q * s + a`` stays within a byte for every
q that occurs in it. The weight is ``W = sigma * w8``.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Columns of one packed block, and the unit in which columns are sliced. As a rule the columns of a
row of a block share one (s, a) pair."""

FINE_GROUP = 32
"""Columns that share one (s, a) pair in a weight with groups of 32."""

PANEL = 64
"""Rows of one block of the packed layout."""

BLOCK_BYTES = PANEL * GROUP // 2 + 2 * PANEL
"""Bytes of one packed block: 64 x 64 nibbles and one (s, a) pair for each row."""

BLOCK_BYTES_G32 = PANEL * GROUP // 2 + 2 * PANEL * (GROUP // FINE_GROUP)
"""The same for groups of 32, two of which make a block."""

BLOCK_BYTES_6 = PANEL * GROUP * 6 // 8 + 2 * PANEL
"""The same for 6-bit codes."""

Q_MAX = 15
"""Largest value of a nibble."""

MAX_IN_FEATURES = (2**31 - 1) // (127 * 128)
"""Largest K whose INT32 accumulator cannot overflow: 132 104."""


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def padded(in_features: int) -> int:
    """K rounded up to whole groups."""
    return ceil_div(in_features, GROUP) * GROUP


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 ``[..., K]`` with values 0..15 (K even) to uint8 ``[..., K / 2]``."""
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(qweight: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 ``[..., K / 2]`` to uint8 ``[..., K]``."""
    return torch.stack((qweight & 0xF, qweight >> 4), dim=-1).flatten(-2)


def pack_codes(q: Tensor, bits: int = 4) -> Tensor:
    """uint8 ``[..., K]``, values below 2^bits, to uint8 ``[..., bits K / 8]``, bits 4 or 6."""
    if bits == 4:
        return pack_nibbles(q)
    a, b, c, d = q.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=-1).flatten(-2)


def unpack_codes(qweight: Tensor, bits: int = 4) -> Tensor:
    """Inverse of `pack_codes`."""
    if bits == 4:
        return unpack_nibbles(qweight)
    a, b, c = qweight.unflatten(-1, (-1, 3)).unbind(-1)
    q = torch.stack((a, a >> 6 | b << 2, b >> 4 | c << 4, c >> 2), dim=-1)
    return (q & 63).flatten(-2)


def code_bits(qweight: Tensor, qscale: Tensor) -> int:
    """4 or 6, by the bytes of a group. What is of neither is taken for 4."""
    both = qweight.dim() == 2 and qscale.dim() == 2
    return 6 if both and qweight.shape[1] == qscale.shape[1] * GROUP * 6 // 8 > 0 else 4


def group_of(qweight: Tensor, qscale: Tensor) -> int:
    """Columns that share an (s, a) pair: 32 if the shapes say so, else 64."""
    both = qweight.dim() == 2 and qscale.dim() == 2
    fine = both and qweight.shape[1] * 2 == qscale.shape[1] * FINE_GROUP > 0
    return FINE_GROUP if fine else GROUP


def decode(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> Tensor:
    """INT8 weights ``[N, K]`` of the logical tensors (feasible, or the bytes wrap)."""
    group = group_of(qweight, qscale)
    q = unpack_codes(qweight, code_bits(qweight, qscale)).unflatten(-1, (-1, group))
    byte = q * qscale.unsqueeze(-1) + qoffset.unsqueeze(-1)
    return (byte ^ 0x80).view(torch.int8).flatten(-2)


def first_infeasible(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> tuple[int, int] | None:
    """``(row, group)`` of the first group in which some ``q * s + a`` exceeds 255, or None."""
    bits = code_bits(qweight, qscale)
    overflow = (2**bits - 1) * qscale.int() + qoffset.int() > 255
    if not overflow.any():  # as in almost every weight: whatever the codes are
        return None
    suspects = overflow.nonzero()
    row, group = suspects.unbind(1)
    columns = group_of(qweight, qscale)
    codes = qweight.unflatten(1, (-1, columns * bits // 8))[row, group]
    largest = unpack_codes(codes, bits).amax(1)
    overflow = largest.int() * qscale[row, group].int() + qoffset[row, group].int() > 255
    if not overflow.any():
        return None
    first = overflow.nonzero()[0, 0]
    return tuple(suspects[first].tolist())
