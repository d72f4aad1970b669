"""Between the logical and the packed layout of a linear layer, whose format the tensors decide."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..formats import int8, liquidquant6


def pack(
    logical: Sequence[Tensor],
    columns: Tensor | None,
    in_features: int,
    packed: Tensor | None = None,
) -> Tensor:
    """Packed with 8 or 6 bits if the tensors are so, else as they are, or known to be."""
    qweight, qscale, qoffset = logical
    if int8.is_int8(qweight, qscale, qoffset, columns, in_features):
        return ops.pack_int8_weight(int8.bytes_of(qweight))
    if liquidquant6.is_six_bits(qweight, qscale, qoffset, columns, in_features):
        return ops.pack_weight(*liquidquant6.to_kernel(qweight, qscale, qoffset))
    return ops.pack_weight(*logical) if packed is None else packed


def bits_of(packed: Tensor) -> int:
    return 8 if int8.is_packed(packed) else 6 if liquidquant6.is_packed(packed) else 4


def unpack(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    bits = bits_of(packed)
    if bits == 8:
        return int8.logical_of(ops.unpack_int8_weight(packed, n))
    logical = ops.unpack_weight(packed, n)
    return logical if bits == 4 else liquidquant6.from_kernel(*logical)
