"""Weights of other projects that become INT8 weights: of 8 bits, or in groups finer than ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import int8
from ..formats.liquidquant import GROUP, pack_nibbles, padded
from ..ops import FLOATS
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, dequantize_weight

INT8_MIN, INT8_MAX = -128, 127

CHUNK = 1 << 22
"""Elements that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class ByteWeight:
    """``W = scale * (code - zero)`` with 8-bit codes.

    Attributes:
        codes: int16 ``[N, K]``, -128 to 127.
        zero: int16 ``[N]``, likewise.
        scale: float32 ``[N]``.
        bias: float ``[N]`` or None.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _check_bias(self.bias, len(self.codes))

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    @property
    def span(self) -> int:
        return self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as the source's own arithmetic has it, ``[N, K]``."""
        values = (self.codes - self.zero.unsqueeze(1)).double()
        return (self.scale.double().unsqueeze(1) * values).to(dtype)

    def fit(self) -> QuantizedWeight:
        """The weight as two times four bits: the high ones, and the low ones in residual columns.

        Raises:
            ValueError: the zero of a row leaves values that two groups cannot hold together.
        """
        n, k = self.codes.shape
        values = (self.codes - self.zero.unsqueeze(1)).int()
        values = torch.where(self.scale.unsqueeze(1) < 0, -values, values)
        low, high = values.aminmax(dim=1)
        # Without a zero the two offsets are -128 and 0, as wherever weights have 8 bits here.
        least = torch.where((low >= INT8_MIN) & (high <= INT8_MAX), INT8_MIN, low.clamp(max=-1))
        offset = torch.where(least <= -16, -128, -113)
        residual = least - offset
        codes = values - least.unsqueeze(1)
        # Residual columns past K repeat the last one, and have to be zeros.
        ragged = bool(k % GROUP and residual.any())
        if ragged or (codes > 255).any():
            raise ValueError(
                f"zero points: expected 8-bit weights of {INT8_MIN} to {INT8_MAX} once they are "
                f"subtracted, got {int(low.min())} to {int(high.max())}"
                + (f" and no multiple of {GROUP} columns" if ragged else "")
            )
        codes = F.pad(codes.to(torch.uint8), (0, padded(k) - k))
        groups = padded(k) // GROUP

        def wide(parameter: Tensor) -> Tensor:
            return parameter.to(torch.uint8).unsqueeze(1).expand(n, groups)

        step = torch.ones(n, dtype=torch.int32)
        return QuantizedWeight(
            pack_nibbles(torch.cat((codes >> 4, codes & 15), 1)),
            torch.cat((wide(16 * step), wide(step)), 1),
            torch.cat((wide(offset - INT8_MIN), wide(residual - INT8_MIN)), 1),
            self.scale.abs(),
            k,
            int8.columns_of(k),
        )


@dataclass(frozen=True, eq=False)
class FineWeight:
    """A weight that cannot keep its codes here, expanded by the source's own arithmetic.

    Attributes:
        values: float32 ``[N, K]``.
        span: columns of a group.
        bias: float ``[N]`` or None.
    """

    values: Tensor
    span: int
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.values.isfinite().all():
            raise ValueError("weight: expected finite values, got a NaN or an infinity")
        _check_bias(self.bias, len(self.values))

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.values.shape
        return n, k

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)

    def fit(self, bits: int, group_size: int) -> tuple[QuantizedWeight, float]:
        """The weight in 8 bits with one scale per row, or in 4 bits searched anew; its error.

        Args:
            bits: 8 or 4.
            group_size: of 4 bits.

        In 8 bits, rows whose values are all integers up to 127 times a power of two, as those of
        MXFP4 mostly are, keep them.
        """
        weight = self._in_bytes() if bits == 8 else quantize_weight(self.values, group_size)
        error = norm = 0.0
        rows = max(1, CHUNK // self.values.shape[1])
        values = dequantize_weight(weight)
        for ours, theirs in zip(values.split(rows), self.values.split(rows), strict=True):
            error += float((ours.double() - theirs).square().sum())
            norm += float(theirs.double().square().sum())
        return weight, (error / norm) ** 0.5 if norm > 0 else error**0.5

    def _in_bytes(self) -> QuantizedWeight:
        codes, scales = [], []
        for values in self.values.split(max(1, CHUNK // self.values.shape[1])):
            largest, unit = values.abs().amax(1), _power_of_two(values)
            scale = torch.where(largest <= INT8_MAX * unit, unit, largest / INT8_MAX)
            units = (values / torch.where(scale > 0, scale, 1).unsqueeze(1)).round_()
            codes.append(units.clamp_(-INT8_MAX, INT8_MAX).short())
            scales.append(scale)
        w8 = torch.cat(codes)
        return ByteWeight(w8, w8.new_zeros(len(w8)), torch.cat(scales)).fit()


def _check_bias(bias: Tensor | None, n: int) -> None:
    if bias is None:
        return
    if list(bias.shape) != [n] or bias.dtype not in FLOATS:
        raise ValueError(
            f"bias: expected floats of shape {[n]}, got {bias.dtype} of {list(bias.shape)}"
        )
    if not bias.isfinite().all():
        raise ValueError("bias: expected finite values, got a NaN or an infinity")


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two ``[N]`` of which each value of a row of float32 is a multiple."""
    mantissa, exponent = torch.frexp(values)
    integer = (mantissa * 2**24).int()
    lowest = (integer & -integer).float().log2() - 24 + exponent
    return torch.where(values != 0, lowest, torch.inf).amin(1).exp2().nan_to_num(posinf=0)
