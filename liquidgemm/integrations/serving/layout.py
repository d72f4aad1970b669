"""The weight of an engine's layer: rows of several layers, and of a row the columns of one GPU.

An engine computes layers with the same input as one, "fused" (q, k and v; gate and up), and under
tensor parallelism gives each GPU a slice of the rows (column-parallel) or of the columns
(row-parallel). Rows can be sliced and stacked as they are. Columns need care, since 64 of them
share a step and an offset:

- A slice that begins or ends within a group holds the whole group. The features that are not its
  own are zeros.
- Layers that are fused may each have residual columns of their own. One product needs one list: the
  different lists one after the other, each with the residuals of its own layers and zeros for the
  others.
- Of a row-parallel slice, some residual columns repeat features of other GPUs. Those keep their
  place and repeat a zero.

None of this changes a sum: what is added to it are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.liquidquant import GROUP, group_of, padded
from ...nn import _packing
from ...ops import pack_weight

_ZERO = 128  # the offset of a group whose codes of 0 are weights of 0


@dataclass(frozen=True)
class Slice:
    """The input features of a GPU: ``start`` to ``start + length`` of ``total``."""

    start: int
    length: int
    total: int

    @property
    def lead(self) -> int:
        """Features of other GPUs in the group in which the slice begins."""
        return self.start % GROUP

    @property
    def held(self) -> int:
        """Columns that the GPU holds, without residual ones: whole groups."""
        return padded(self.lead + self.length)

    def width(self, augment: int) -> int:
        """Columns that the GPU holds of a layer with so many residual columns."""
        return self.held + (self.held if self._complete(augment) else augment)

    def of_codes(self, tensor: Tensor, augment: int) -> Tensor:
        """The GPU's part of codes, steps or offsets.

        Args:
            tensor: of the whole layer, uint8 ``[N, P / 2]``, ``[N, P / 64]`` or ``[N, P / 32]``
                with ``P = padded(total) + augment``.
        """
        total = padded(self.total)
        first, held = self.start - self.lead, self.held

        def columns(start: int, count: int) -> Tensor:
            per_byte = (total + augment) // tensor.shape[1]
            return tensor[:, start // per_byte : (start + count) // per_byte]

        if self._complete(augment):
            residual = columns(total + first, held)
        else:
            residual = columns(total, augment)
        return torch.cat((columns(first, held), residual), 1)

    def of_columns(self, columns: Tensor) -> Tensor:
        """Where among the columns that the GPU holds its residual columns find their features.

        Args:
            columns: int32 ``[R]``, of the whole layer.

        Raises:
            ValueError: they are no features.
        """
        if len(columns) and not ((columns >= 0) & (columns < self.total)).all():
            raise ValueError(f"columns: expected 0 to {self.total - 1}, got others, or none at all")
        first = self.start - self.lead
        if self._complete(len(columns)):
            columns = columns[first : first + self.held]
        local = columns - first
        end = self.lead + self.length
        return torch.where((local >= self.lead) & (local < end), local, end)

    def _complete(self, augment: int) -> bool:
        """Whether all columns are stored twice, in their order, so that they are sliced as well."""
        return augment == padded(self.total)


@dataclass(frozen=True)
class Packed:
    """What an engine's layer computes with, as one product.

    Attributes:
        weight: packed, uint8 ``[ceil(N / 64), (held + R) / 64, 2176]``; or 2304 in groups of 32,
            and 3200 with 6 bits and 4096 with 8, R = 0.
        scale: float32 ``[N]``.
        gather: int32 ``[R]``, which of the held columns are repeated, or None.
        pad: zeros before and after the features of x.
    """

    weight: Tensor
    scale: Tensor
    gather: Tensor | None
    pad: tuple[int, int]


def pack(
    codes: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    rows: Sequence[int],
    columns: Sequence[Tensor],
    part: Slice,
) -> Packed:
    """Pack the layers that an engine computes as one.

    Args:
        codes: qweight, qscale and qoffset of all their rows, as wide as the widest of them.
        scale: float32 ``[N]``.
        rows: how many are of each layer.
        columns: the residual columns of each layer, int32, by `Slice.of_columns`.
        part: the features of x.

    Raises:
        RuntimeError: a group of codes that is not feasible.
        ValueError: a scale that is negative or not finite.
    """
    if not ((scale >= 0) & scale.isfinite()).all():
        raise ValueError("scale: expected finite values >= 0, got others, or none were loaded")
    lists: list[Tensor] = []
    slots = []
    for own in columns:
        slot = next((i for i, other in enumerate(lists) if torch.equal(own, other)), None)
        if slot is None and len(own):
            slot = len(lists)
            lists.append(own)
        slots.append(slot)
    width, end = part.held, part.lead + part.length
    if not lists:
        bare = (tensor[:, : _units(tensor, codes, width)] for tensor in codes)
        return Packed(pack_weight(*bare), scale, None, (part.lead, 0))
    if len(lists) > 1 or None in slots:
        codes = _side_by_side(codes, rows, slots, [len(own) for own in lists], width)
        weight = pack_weight(*codes)
    else:
        weight = _packing.pack(codes, lists[0], end)
        if _packing.bits_of(weight) != 4:  # which hold all columns themselves
            return Packed(weight, scale, None, (part.lead, 0))
    gather = torch.cat(lists)
    zeros = max(width - end, int(gather.max()) + 1 - end)
    return Packed(weight, scale, gather, (part.lead, zeros))


def _units(tensor: Tensor, codes: tuple[Tensor, ...], columns: int) -> int:
    """How many elements of a row hold so many columns."""
    return columns // (2 if tensor is codes[0] else group_of(*codes[:2]))


def _side_by_side(
    codes: tuple[Tensor, Tensor, Tensor],
    rows: Sequence[int],
    slots: Sequence[int | None],
    lengths: Sequence[int],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes with a place of its own for each list of residual columns."""
    starts = [width + sum(lengths[:slot]) for slot in range(len(lengths))]
    result = []
    for tensor, zero in zip(codes, (0, 1, _ZERO), strict=True):
        base = _units(tensor, codes, width)
        whole = tensor.new_full((len(tensor), _units(tensor, codes, width + sum(lengths))), zero)
        whole[:, :base] = tensor[:, :base]
        first = 0
        for count, slot in zip(rows, slots, strict=True):
            if slot is not None:
                start, length = (_units(tensor, codes, n) for n in (starts[slot], lengths[slot]))
                part = slice(first, first + count)
                whole[part, start : start + length] = tensor[part, base : base + length]
            first += count
        result.append(whole)
    qweight, qscale, qoffset = result
    return qweight, qscale, qoffset


def as_packed(x: Tensor, gather: Tensor | None, pad: tuple[int, int]) -> Tensor:
    """x ``[..., K]`` with a column for each that the packed weight has.

    Either float or quantized: what is repeated or zero does not change the scale of a token.

    Args:
        gather, pad: of the `Packed`.
    """
    if gather is None and not pad[0]:  # an op takes less columns than whole groups
        return x
    whole = F.pad(x, pad) if any(pad) else x
    if gather is None:
        return whole
    held = whole.shape[-1] // GROUP * GROUP
    return torch.cat((whole[..., :held], whole.index_select(-1, gather)), -1)
