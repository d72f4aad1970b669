"""A 4-bit weight as another project stores it, and its way to our grid (`formats.liquidquant`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.liquidquant import FINE_GROUP, GROUP, Q_MAX, ceil_div, pack_nibbles, padded
from ..ops import FLOATS
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, dequantize_weight
from .wide import CHUNK, INT8_MAX, INT8_MIN, ByteWeight, FineWeight

_MAX_STEP = (INT8_MAX - INT8_MIN) // Q_MAX


@dataclass(frozen=True, eq=False)
class SourceWeight:
    """``W = step * code + offset``, with a step and an offset per row and group of columns.

    With a sigma the grid has two levels: ``W = sigma * round(step * code + offset)``.

    Attributes:
        codes: uint8 ``[N, K]``, 0 to 15.
        step, offset: float64 ``[N, G]``, so that their product with a small integer is exact.
        span: columns of a group; the last one may be shorter.
        sigma: float32 ``[N]`` or None.
        bias: float ``[N]`` or None.

    Raises:
        ValueError: at construction, for shapes that do not fit together, or numbers that are not
            finite.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    span: int
    sigma: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = ceil_div(k, self.span)
        if list(self.step.shape) != [n, groups]:
            raise ValueError(
                f"scales: expected shape {[n, groups]} for groups of {self.span}, "
                f"got {list(self.step.shape)}"
            )
        for name, tensor, shape in (
            ("zeros", self.offset, [n, groups]),
            ("channel scales", self.sigma, [n]),
            ("bias", self.bias, [n]),
        ):
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        for name, tensor in (
            ("scales", self.step),
            ("zeros", self.offset),
            ("channel scales", self.sigma),
            ("bias", self.bias),
        ):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"{name}: expected finite values, got a NaN or an infinity")
        if self.bias is not None and self.bias.dtype not in FLOATS:
            raise ValueError(f"bias: expected {FLOATS}, got {self.bias.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def is_finer(self, than: int) -> bool:
        """Whether a group ends inside a run of `than` columns, so that ours cannot hold it."""
        return self.span < self.codes.shape[1] and self.span % than != 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as the source's own arithmetic has it, ``[N, K]``."""
        step, offset = (
            parameter.repeat_interleave(self.span, dim=1)[:, : self.codes.shape[1]]
            for parameter in (self.step, self.offset)
        )
        weight = step * self.codes + offset
        if self.sigma is not None:
            weight = weight.round() * self.sigma.unsqueeze(1)
        return weight.to(dtype)

    def row_chunks(self) -> Iterator[SourceWeight]:
        """The same weight in pieces of some rows."""
        rows = max(1, CHUNK // self.codes.shape[1])
        for start in range(0, len(self.codes), rows):
            chunk = slice(start, start + rows)
            sigma = None if self.sigma is None else self.sigma[chunk]
            yield SourceWeight(
                self.codes[chunk], self.step[chunk], self.offset[chunk], self.span, sigma
            )

    def positive(self) -> SourceWeight:
        """The same weight without a negative step: codes of such a group count backwards."""
        step, offset, sigma = self.step, self.offset, self.sigma
        if sigma is not None:
            sign = torch.where(sigma < 0, -1.0, 1.0).double().unsqueeze(1)
            step, offset, sigma = sign * step, sign * offset, sigma.abs()
        turned = (step < 0).repeat_interleave(self.span, dim=1)[:, : self.codes.shape[1]]
        return replace(
            self,
            codes=torch.where(turned, Q_MAX - self.codes, self.codes),
            step=step.abs(),
            offset=torch.where(step < 0, offset + Q_MAX * step, offset),
            sigma=sigma,
        )


AnyWeight = SourceWeight | ByteWeight | FineWeight


def is_finer(source: AnyWeight, than: int) -> bool:
    """Whether groups of columns are finer than so many, or not known."""
    if isinstance(source, SourceWeight):
        return source.is_finer(than)
    return isinstance(source, FineWeight)


def fit(
    source: AnyWeight, fine_bits: int = 8, finest: int = FINE_GROUP
) -> tuple[QuantizedWeight, float]:
    """The weight on our grid, and the relative error of that: ``|W' - W| / |W|``.

    Groups of 64 columns or more stay groups of 64, those of 32 stay so if that is the finest. Finer
    ones get ``fine_bits``, 8 or 4 (`FineWeight.fit`).

    Rows whose grid is one of ours (integer steps and offsets within INT8) are converted code by
    code, without any error. For the others sigma, steps and offsets are searched that come nearest
    to the source's while the codes stay; then each code goes where the weight is nearest. Where
    `quantize_weight` of the dequantized row has less error than that, it is taken instead.
    """
    if isinstance(source, ByteWeight):
        return source.fit(), 0.0
    if isinstance(source, SourceWeight) and source.is_finer(finest):
        source = FineWeight(source.dequantize(), source.span, source.bias)
    if isinstance(source, FineWeight):
        return source.fit(fine_bits, finest)
    parts, error, norm = [], 0.0, 0.0
    for chunk in source.row_chunks():
        positive = chunk.positive()
        exact, part = _exact(positive)
        if not exact.all():
            part = _select(exact, part, _nearest(positive))
        parts.append(part)
        reference = chunk.dequantize(torch.float64)
        error += float((_values(part) - reference).square().sum())
        norm += float(reference.square().sum())
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("qweight", "qscale", "qoffset", "scale")
    }
    weight = QuantizedWeight(**tensors, in_features=source.codes.shape[1])
    return weight, (error / norm) ** 0.5 if norm > 0 else error**0.5


def _values(weight: QuantizedWeight) -> Tensor:
    """The dequantized weight in float64, in which the products are exact."""
    units = replace(weight, scale=torch.ones_like(weight.scale))
    return dequantize_weight(units, torch.float64) * weight.scale.double().unsqueeze(1)


def _select(rows: Tensor, one: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """Rows of one where rows ``[N]`` is true, of the other elsewhere."""

    def pick(name: str) -> Tensor:
        a, b = getattr(one, name), getattr(other, name)
        return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    names = ("qweight", "qscale", "qoffset", "scale")
    return QuantizedWeight(**{name: pick(name) for name in names}, in_features=one.in_features)


# Below, codes lie as float64 [R, G, 64], or 32, with each group's smallest at 0, so that an offset
# is the least value of its group; step and offset are [R, G].


def _group_of(source: SourceWeight) -> int:
    """Columns of our groups."""
    return FINE_GROUP if source.is_finer(GROUP) else GROUP


def _by_group(source: SourceWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and offsets; columns past K repeat the last one."""
    k, group = source.codes.shape[1], _group_of(source)
    missing = padded(k) - k
    codes = torch.cat((source.codes, source.codes[:, -1:].expand(-1, missing)), dim=1)
    codes = codes.double().unflatten(1, (-1, group))
    groups = codes.shape[1]
    repeats = ceil_div(min(source.span, k), group)

    def per_group(parameter: Tensor) -> Tensor:
        wide = parameter.double().repeat_interleave(repeats, dim=1)[:, :groups]
        return torch.cat((wide, wide[:, -1:].expand(-1, groups - wide.shape[1])), dim=1)

    step, offset = per_group(source.step), per_group(source.offset)
    least = codes.amin(2)
    return codes - least.unsqueeze(2), step, offset + step * least


def _exact(source: SourceWeight) -> tuple[Tensor, QuantizedWeight]:
    """Which rows ``[R]`` have a grid that is one of ours, and those rows; the others are zero."""
    codes, step, offset = _by_group(source)
    largest = codes.amax(2)
    if source.sigma is None:
        # One step for the whole row: it is sigma. Groups of equal codes have no use for a step.
        scale = torch.where(largest > 0, step, 0).amax(1)
        scale = torch.where(scale > 0, scale, step.amax(1))
        unit = torch.where(scale > 0, scale, 1).unsqueeze(1)
        s, z = step / unit, offset / unit
    else:
        scale, s, z = source.sigma.double(), step, offset
    s = torch.where(largest > 0, s, 1)
    exact = (s == s.round()) & (z == z.round()) & (s >= 1) & (z >= INT8_MIN)
    exact = (exact & (s * largest + z <= INT8_MAX)).all(1)
    s, z = torch.where(exact.unsqueeze(1), s, 1), torch.where(exact.unsqueeze(1), z, 0)
    codes = torch.where(exact.view(-1, 1, 1), codes, 0)
    return exact, _logical(codes, s, z, torch.where(exact, scale, 0), source.codes.shape[1])


def _logical(codes: Tensor, s: Tensor, z: Tensor, scale: Tensor, k: int) -> QuantizedWeight:
    q = codes.to(torch.uint8).flatten(1)
    q[:, k:] = 0
    return QuantizedWeight(
        pack_nibbles(q), s.to(torch.uint8), (z - INT8_MIN).to(torch.uint8), scale.float(), k
    )


def _nearest(source: SourceWeight) -> QuantizedWeight:
    """The better, row by row, of the nearest grid to the source's and a new search."""
    k = source.codes.shape[1]
    codes, step, offset = _by_group(source)
    target = codes * step.unsqueeze(2) + offset.unsqueeze(2)
    if source.sigma is not None:
        target.round_()
    sigma, s, z = _search_grid(codes, step, offset, target)
    s, z = s.unsqueeze(2), z.unsqueeze(2)
    q = ((target / sigma.view(-1, 1, 1) - z) / s).round_()
    q = torch.minimum(q.clamp_(0, Q_MAX), ((INT8_MAX - z) / s).floor())
    # With the integers fixed, the best sigma is a least-squares fit.
    w8 = (q * s + z).flatten(1)[:, :k]
    target = target.flatten(1)[:, :k]
    square = w8.square().sum(1)
    fitted = (w8 * target).sum(1) / torch.where(square > 0, square, 1)
    # In the arithmetic of a GEMM sigma is a float32.
    unit = 1 if source.sigma is None else source.sigma.double()
    sigma = torch.where(fitted > 0, fitted, sigma)
    kept = _logical(q, s.squeeze(2), z.squeeze(2), sigma * unit, k)

    values = source.dequantize(torch.float64)
    searched = quantize_weight(values.float(), _group_of(source))

    def error(weight: QuantizedWeight) -> Tensor:
        return (_values(weight) - values).square().sum(1)

    return _select(error(kept) <= error(searched), kept, searched)


def _search_grid(
    codes: Tensor, step: Tensor, offset: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma ``[R]``, s and z ``[R, G]`` for which ``sigma * (s * code + z)`` is near the target.

    With the codes kept, the squared error of a group is a quadratic in s and z, whose coefficients
    are moments of its codes; so a candidate costs nothing per weight.
    """
    largest, mean = codes.amax(2), codes.mean(2)
    variance = (codes - mean.unsqueeze(2)).square().mean(2)
    flat = target.flatten(1)
    smallest = torch.maximum(flat.amax(1) / INT8_MAX, flat.amin(1) / INT8_MIN)
    smallest = torch.where(smallest > 0, smallest, 1)

    best_error = torch.full_like(smallest, torch.inf)
    best_sigma, best_s, best_z = smallest, torch.ones_like(step), torch.zeros_like(step)
    for sigma in _sigmas(step, smallest):
        slope, start = step / sigma.unsqueeze(1), offset / sigma.unsqueeze(1)
        group_error = torch.full_like(step, torch.inf)
        group_s, group_z = best_s, best_z
        for s in (slope.floor().clamp_(1, _MAX_STEP), slope.ceil().clamp_(1, _MAX_STEP)):
            excess = slope - s
            z = (start + excess * mean).round_().clamp_(min=INT8_MIN)
            z = torch.minimum(z, (INT8_MAX - s * largest).clamp_min_(INT8_MIN))
            error = excess.square() * variance + (start + excess * mean - z).square()
            # Codes that move to the nearest value have no more than the error of rounding.
            error = torch.minimum(error, s.square() / 12)
            better = error < group_error
            group_error = torch.where(better, error, group_error)
            group_s, group_z = torch.where(better, s, group_s), torch.where(better, z, group_z)
        error = group_error.sum(1) * sigma.square()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_sigma = torch.where(better, sigma, best_sigma)
        better = better.unsqueeze(1)
        best_s, best_z = torch.where(better, group_s, best_s), torch.where(better, group_z, best_z)
    return best_sigma, best_s, best_z


def _sigmas(step: Tensor, smallest: Tensor) -> Iterator[Tensor]:
    """Candidates ``[R]`` that leave no value out of INT8's range: the source's own unit, whole
    fractions of the row's largest step, and an even cover of one octave."""
    coarsest = step.amax(1)
    for candidate in (torch.ones_like(smallest), *(coarsest / m for m in range(1, _MAX_STEP + 1))):
        yield torch.where(candidate >= smallest, candidate, smallest)
    for octave in torch.linspace(0, 1, 33).tolist():
        yield smallest * 2**octave
