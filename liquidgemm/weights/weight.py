"""A weight in the logical layout of `formats.liquidquant`, checked, sliced and expanded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..formats import int8, liquidquant6
from ..formats.liquidquant import (
    FINE_GROUP,
    GROUP,
    MAX_IN_FEATURES,
    decode,
    first_infeasible,
    group_of,
    padded,
)


@dataclass(frozen=True)
class Form:
    """What shapes the tensors of a `QuantizedWeight` beside its rows and columns: the number of
    residual columns, and the columns of a group."""

    augment: int = 0
    group_size: int = GROUP


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight ``[N, in_features]`` in the logical layout (see `formats.liquidquant`).

    K below is in_features rounded up to a multiple of 64, plus R if there are columns.

    The R columns past in_features and its padding repeat input features: what they decode to is
    added to the weight of the feature, a residual (as in arXiv 2601.07475). With s = 16 below it
    and s = 1 in it, a weight has all 8 bits.

    Attributes:
        qweight: uint8 ``[N, K / 2]``, column 2j in the low nibble of byte j.
        qscale: uint8 ``[N, K / 64]``, step s of each group; or ``[N, K / 32]``.
        qoffset: uint8 of that shape, offset a of each group.
        scale: float32 ``[N]``, sigma of each row.
        in_features: number of columns that are neither padding nor residual.
        columns: int32 ``[R]``, the input feature that each residual column repeats, R a multiple
            of 64; or None.

    Raises:
        ValueError: at construction, for a wrong dtype, shape or device, a scale that is negative
            or not finite, or a group in which some ``q * s + a`` exceeds 255.
    """

    qweight: Tensor
    qscale: Tensor
    qoffset: Tensor
    scale: Tensor
    in_features: int
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.in_features <= MAX_IN_FEATURES:
            raise ValueError(
                f"in_features: expected 1 to {MAX_IN_FEATURES} so that int32 accumulation cannot "
                f"overflow, got {self.in_features}"
            )
        if self.scale.dim() != 1 or len(self.scale) < 1:
            raise ValueError(f"scale: expected shape [N] with N >= 1, got {list(self.scale.shape)}")
        if self.columns is not None:
            self._check_columns(self.columns)
        n, k = self.out_features, padded(self.in_features) + self.augment
        groups = k // (FINE_GROUP if self.qscale.shape[-1:] == (k // FINE_GROUP,) else GROUP)
        for name, dtype, shape in (
            ("qweight", torch.uint8, [n, k // 2]),
            ("qscale", torch.uint8, [n, groups]),
            ("qoffset", torch.uint8, [n, groups]),
            ("scale", torch.float32, [n]),
        ):
            tensor = getattr(self, name)
            if tensor.dtype != dtype:
                raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: expected shape {shape} for in_features = {self.in_features}, "
                    f"got {list(tensor.shape)}"
                )
            if tensor.device != self.qweight.device:
                raise ValueError(
                    f"{name}: expected on {self.qweight.device} like qweight, "
                    f"got on {tensor.device}"
                )
        if self.qweight.is_meta:
            return
        bad = ~(self.scale.isfinite() & (self.scale >= 0))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"scale: expected finite values >= 0, got {self.scale[row].item()} in row {row}"
            )
        infeasible = first_infeasible(self.qweight, self.qscale, self.qoffset)
        if infeasible is not None:
            row, group = infeasible
            raise ValueError(
                f"qscale, qoffset: expected q * s + a <= 255, got more in row {row}, group {group} "
                f"(s = {int(self.qscale[row, group])}, a = {int(self.qoffset[row, group])})"
            )

    def _check_columns(self, columns: Tensor) -> None:
        if columns.dtype != torch.int32 or columns.dim() != 1 or len(columns) % GROUP:
            raise ValueError(
                f"columns: expected int32 [R] with R a multiple of {GROUP}, "
                f"got {columns.dtype} {list(columns.shape)}"
            )
        if padded(self.in_features) + len(columns) > MAX_IN_FEATURES:
            raise ValueError(
                f"columns: expected no more than {MAX_IN_FEATURES} columns in all so that int32 "
                f"accumulation cannot overflow, got {padded(self.in_features)} + {len(columns)}"
            )
        if columns.is_meta or not len(columns):
            return
        low, high = (extremum.item() for extremum in columns.aminmax())
        if low < 0 or high >= self.in_features:
            raise ValueError(
                f"columns: expected 0 to {self.in_features - 1}, got {low if low < 0 else high}"
            )

    @property
    def out_features(self) -> int:
        return len(self.scale)

    @property
    def augment(self) -> int:
        """Number of residual columns."""
        return 0 if self.columns is None else len(self.columns)

    @property
    def group_size(self) -> int:
        """Columns that share a step and an offset: 64 or 32."""
        return group_of(self.qweight, self.qscale)

    @property
    def is_int8(self) -> bool:
        """Whether it is an INT8 weight, as the kernels then hold it: see `formats.int8`."""
        return int8.is_int8(self.qweight, self.qscale, self.qoffset, self.columns, self.in_features)

    @property
    def is_six_bits(self) -> bool:
        """Whether it has 6-bit codes, as the kernels then hold it: see `formats.liquidquant6`."""
        tensors = self.qweight, self.qscale, self.qoffset, self.columns
        return liquidquant6.is_six_bits(*tensors, self.in_features)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with its tensors on device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def narrow_rows(self, start: int, length: int) -> QuantizedWeight:
        """Output channels ``start`` to ``start + length``: a column-parallel slice (views).

        Raises:
            ValueError: the range is empty or not within the rows.
        """
        _check_range("rows", start, length, self.out_features)
        return replace(
            self,
            qweight=self.qweight.narrow(0, start, length),
            qscale=self.qscale.narrow(0, start, length),
            qoffset=self.qoffset.narrow(0, start, length),
            scale=self.scale.narrow(0, start, length),
        )

    def narrow_columns(self, start: int, length: int) -> QuantizedWeight:
        """Input features ``start`` to ``start + length``: a row-parallel slice (views).

        Raises:
            ValueError: the range is empty or not within the columns, or does not begin and end at
                a group: start and length must be multiples of 64, except that the slice may end
                at in_features. Or the weight has residual columns, which belong to no slice.
        """
        if self.augment:
            raise ValueError(
                f"columns: expected a weight without residual columns, got {self.augment}: "
                "quantize the slices instead"
            )
        _check_range("columns", start, length, self.in_features)
        stop = start + length
        if start % GROUP or (stop % GROUP and stop != self.in_features):
            raise ValueError(
                f"columns: expected a slice of whole groups of {GROUP}, got {start} to {stop}"
            )
        held, per_group = padded(length), self.group_size
        return replace(
            self,
            qweight=self.qweight.narrow(1, start // 2, held // 2),
            qscale=self.qscale.narrow(1, start // per_group, held // per_group),
            qoffset=self.qoffset.narrow(1, start // per_group, held // per_group),
            in_features=length,
        )


def zeros(
    in_features: int, out_features: int, form: Form, device: torch.device | str | None = None
) -> QuantizedWeight:
    """A weight of zeros.

    Raises:
        ValueError: a form that there is not, or as `QuantizedWeight`.
    """
    augment, group_size = form.augment, form.group_size
    if type(augment) is not int or augment < 0 or augment % GROUP:
        raise ValueError(f"augment: expected a multiple of {GROUP}, got {augment!r}")
    if type(group_size) is not int or group_size not in (FINE_GROUP, GROUP):
        raise ValueError(f"group_size: expected {FINE_GROUP} or {GROUP}, got {group_size!r}")
    columns = padded(in_features) + augment
    n, groups = out_features, columns // group_size
    return QuantizedWeight(
        qweight=torch.zeros(n, columns // 2, dtype=torch.uint8, device=device),
        qscale=torch.ones(n, groups, dtype=torch.uint8, device=device),
        qoffset=torch.full((n, groups), 128, dtype=torch.uint8, device=device),
        scale=torch.zeros(n, dtype=torch.float32, device=device),
        in_features=in_features,
        columns=torch.zeros(augment, dtype=torch.int32, device=device) if augment else None,
    )


def _check_range(what: str, start: int, length: int, size: int) -> None:
    if start < 0 or length < 1 or start + length > size:
        raise ValueError(
            f"{what}: expected a non-empty slice of 0 to {size}, got {start} to {start + length}"
        )


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``sigma * w8``, multiplied in float32 and rounded once to dtype: ``[N, in_features]``."""
    decoded = decode(weight.qweight, weight.qscale, weight.qoffset)
    w8 = decoded[:, : weight.in_features]
    if weight.columns is not None:
        residual = decoded[:, padded(weight.in_features) :].int()
        w8 = w8.int().index_add(1, weight.columns, residual)
    return (w8.float() * weight.scale.unsqueeze(-1)).to(dtype)


def joined(*parts: QuantizedWeight) -> QuantizedWeight:
    """Weights of the same columns, one below the other."""
    names = [f.name for f in fields(QuantizedWeight) if f.name not in ("in_features", "columns")]
    rows: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    return replace(parts[0], **rows)
