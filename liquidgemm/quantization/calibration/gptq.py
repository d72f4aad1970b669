"""GPTQ (arXiv 2210.17323) on the two-level grid, residual columns included.

Rows are scaled by 1 / sigma, so that the grid of every row is ``v = z + s q`` in integers. Grids
are those of a weight that is quantized already and stay as they are (static groups), so columns can
be taken in any order, here of falling diag(H), without an index table at run time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats import int8, liquidquant6
from ...formats.liquidquant import GROUP, Q_MAX, pack_nibbles, padded
from ...weights.weight import QuantizedWeight, dequantize_weight

_BLOCK = 128

# Steps of residual columns: half a step of 17 is within reach of 1, the others are for what the
# grid below has cut off.
_RESIDUAL_STEPS = (1, 2, 4)
_ZERO = 128  # qoffset - z
_ROWS = 8192  # of an INT8 weight, such as a head, that are rounded at a time


def gptq(
    weight: Tensor,
    base: QuantizedWeight,
    factor: Tensor,
    order: Tensor,
    columns: Tensor | None = None,
) -> QuantizedWeight:
    """Choose the codes of a weight so that later columns make up for the errors of earlier ones.

    Args:
        weight: float32 ``[N, K]``.
        base: the grids, without residual columns; its codes are of no account.
        factor: upper Cholesky factor of ``H⁻¹`` with rows and columns in this order, ``[K, K]``.
        order: int64 ``[K]``, the columns in the order in which they are rounded.
        columns: int32 ``[R]``, columns that get a residual; R a multiple of 64.

    Returns:
        a weight with the grids of base.
    """
    k = weight.shape[1]
    q_max = liquidquant6.Q_MAX if base.is_six_bits else Q_MAX
    units = (weight / _nonzero(base.scale).unsqueeze(1)).T.contiguous()[order]
    s, z = (p.T.contiguous()[order] for p in _grid(base, k))
    code = torch.empty_like(units)
    slots: dict[int, int] = {}  # position in this order to residual column
    if columns is not None:
        fine_s, fine_z = _residual_grid(weight, base, columns)
        wide = [p.T.repeat_interleave(GROUP, dim=0).contiguous() for p in (fine_s, fine_z)]
        residual = torch.zeros(len(columns), len(weight), device=weight.device)
        slot = {column: i for i, column in enumerate(columns.tolist())}
        slots = {j: slot[column] for j, column in enumerate(order.tolist()) if column in slot}
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block, part = units[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            q = ((block[i] - z[j]) / s[j]).round_().clamp_(0, q_max)
            v = torch.addcmul(z[j], q, s[j])
            code[j] = q
            if (r := slots.get(j)) is not None:
                fine = ((block[i] - v - wide[1][r]) / wide[0][r]).round_().clamp_(0, Q_MAX)
                residual[r] = fine
                v = v + torch.addcmul(wide[1][r], fine, wide[0][r])
            errors[i] = (block[i] - v) / part[i, i]
            if i + 1 < stop - start:
                block[i + 1 :].addr_(part[i, i + 1 :], errors[i], alpha=-1)
        units[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(k, device=order.device)
    codes = code[back].T
    if columns is None:
        return _with_codes(base, codes)
    return _with_residual(_with_codes(base, codes), residual.T, fine_s, fine_z, columns)


def add_residual(weight: Tensor, base: QuantizedWeight, columns: Tensor) -> QuantizedWeight:
    """base with residual columns that take up what rounding has left of ``weight [N, K]``."""
    left = _left(weight, base, columns)
    s, z = _residual_grid(weight, base, columns)
    wide_s, wide_z = (p.repeat_interleave(GROUP, dim=1) for p in (s, z))
    codes = ((left - wide_z) / wide_s).round_().clamp_(0, Q_MAX)
    return _with_residual(base, codes, s, z, columns)


def _left(weight: Tensor, base: QuantizedWeight, columns: Tensor) -> Tensor:
    """What the codes of base leave of some columns, in units of sigma: ``[N, R]``."""
    chosen = columns.long()
    difference = weight[:, chosen] - dequantize_weight(base)[:, chosen]
    return difference / _nonzero(base.scale).unsqueeze(1)


def _residual_grid(weight: Tensor, base: QuantizedWeight, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Integral s and z ``[N, R / 64]`` of least squared error for what base leaves."""
    left = _left(weight, base, columns).unflatten(1, (-1, GROUP))
    centre = (left.amin(2) + left.amax(2)) / 2
    best = torch.full_like(centre, torch.inf)
    best_s, best_z = torch.ones_like(centre), torch.zeros_like(centre)
    for step in _RESIDUAL_STEPS:
        for middle in (torch.zeros_like(centre), centre):
            z = (middle - step * (Q_MAX + 1) / 2).round_().clamp_(-_ZERO, 127 - Q_MAX * step)
            code = ((left - z.unsqueeze(2)) / step).round_().clamp_(0, Q_MAX)
            error = (code * step + z.unsqueeze(2) - left).square_().sum(2)
            better = error < best
            best = torch.where(better, error, best)
            best_s = torch.where(better, step, best_s)
            best_z = torch.where(better, z, best_z)
    return best_s, best_z


def int8_weight(weight: Tensor) -> QuantizedWeight:
    """``round(w / sigma)`` with ``sigma = max|w| / 127``: an INT8 weight.

    Args:
        weight: float32 ``[N, K]``.
    """
    k = weight.shape[1]
    sigma = weight.abs().amax(1) / 127
    # Padding decodes to -128 in the upper bits, as wherever columns are stored twice.
    w8 = weight.new_full((len(weight), padded(k)), -128, dtype=torch.int8)
    for to, rows, unit in zip(
        *(t.split(_ROWS) for t in (w8, weight, _nonzero(sigma))), strict=True
    ):
        to[:, :k] = (rows / unit.unsqueeze(1)).round_().clamp_(-127, 127)
    columns = int8.columns_of(k, weight.device)
    return QuantizedWeight(*int8.logical_of(w8), sigma, k, columns)


def refit_scale(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """The sigma of least error given the codes: ``(w H vᵀ) / (v H vᵀ)`` for each row.

    A row in which that is not positive keeps its sigma.
    """
    unit = replace(quantized, scale=torch.ones_like(quantized.scale))
    v = dequantize_weight(unit)
    vh = v @ hessian
    numerator, denominator = (weight * vh).sum(1), (v * vh).sum(1)
    fits = (numerator > 0) & (denominator > 0)
    ratio = numerator / torch.where(fits, denominator, 1)
    keep = ~fits | (quantized.scale == 0) | ~ratio.isfinite()
    return replace(quantized, scale=torch.where(keep, quantized.scale, ratio))


def column_error(weight: Tensor, approximation: Tensor, importance: Tensor | None) -> Tensor:
    """``H_kk · ‖W_k - Ŵ_k‖²`` of each column, ``[K]``."""
    error = (weight - approximation).square_().sum(0)
    return error if importance is None else error * importance


def worst_columns(error: Tensor, count: int) -> Tensor:
    """int32 ``[count]``: the columns with the largest error ``[K]``, in their order."""
    return error.topk(count).indices.sort().values.int()


def _nonzero(sigma: Tensor) -> Tensor:
    return torch.where(sigma > 0, sigma, 1)


def _grid(base: QuantizedWeight, k: int) -> tuple[Tensor, Tensor]:
    """s and z of each weight as floats ``[N, K]``."""

    def expanded(parameter: Tensor) -> Tensor:
        return parameter.repeat_interleave(base.group_size, dim=1)[:, :k].float()

    qscale, qoffset = base.qscale, base.qoffset
    if base.is_six_bits:
        _, qscale, qoffset = liquidquant6.to_codes(base.qweight, qscale, qoffset)
    return expanded(qscale), expanded(qoffset) - _ZERO


def _with_codes(base: QuantizedWeight, codes: Tensor) -> QuantizedWeight:
    """The grids of base with codes ``[N, K]``."""
    q = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % GROUP)).contiguous()
    if base.is_six_bits:
        _, s, a = liquidquant6.to_codes(base.qweight, base.qscale, base.qoffset)
        qweight, qscale, qoffset = liquidquant6.from_codes(q, s, a)
        return replace(base, qweight=qweight, qscale=qscale, qoffset=qoffset)
    return replace(base, qweight=pack_nibbles(q))


def _with_residual(
    base: QuantizedWeight, codes: Tensor, s: Tensor, z: Tensor, columns: Tensor
) -> QuantizedWeight:
    """base with residual columns: codes ``[N, R]``, s and z ``[N, R / 64]``."""
    residual = pack_nibbles(codes.to(torch.uint8).contiguous())
    s, z = (p.repeat_interleave(GROUP // base.group_size, dim=1) for p in (s, z))
    return replace(
        base,
        qweight=torch.cat((base.qweight, residual), 1),
        qscale=torch.cat((base.qscale, s.to(torch.uint8)), 1),
        qoffset=torch.cat((base.qoffset, (z + _ZERO).to(torch.uint8)), 1),
        columns=columns,
    )
