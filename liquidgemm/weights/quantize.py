"""LiquidQuant weight quantization (arXiv 2509.01229): float weights to the tensors of `formats`.

Two methods give the same format:

- ``"rtn"`` rounds twice, as the paper does: to INT8 by ``sigma = max|w| / 119`` (the protective
  range, which leaves room for the rounding of s), then to 4 bits by the integer step
  ``s = round(range / 15)``.
- ``"search"`` (default) rounds once, from the float weight straight to the composite grid
  ``sigma * (z + s * q)``, and searches sigma per row and (s, z) per group for the least squared
  error. It needs no data, and may use every pair with ``z >= -128`` and ``z + 15 * s <= 127``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import int8, liquidquant6
from ..formats.liquidquant import (
    FINE_GROUP,
    GROUP,
    MAX_IN_FEATURES,
    Q_MAX,
    pack_nibbles,
    padded,
)
from ..ops import _cpu
from .weight import QuantizedWeight

METHODS = ("search", "rtn")
GROUP_SIZES = (32, 64, 128, -1)
BITS = (4, 6)

# The largest |w8| at which every (min, max) pair survives the rounding of s to the nearest integer.
_PROTECTIVE_MAX = 119
_INT8_MIN, _INT8_MAX = -128, 127

# The search grid: sigma as a fraction of max|w| / 119; s around the smallest step that covers the
# range of a group; z around the value that centres the grid on the range, in thirds of a step.
# The first of equal candidates wins, so the plain choice comes first.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_STEP_OFFSETS = (0, -1, -2, 1)
_CENTRE_OFFSETS = (0, -1, 1)

# Elements that are searched at a time: few enough to stay in a core's cache, or to fill a GPU.
_CPU_CHUNK = 1 << 17
_GPU_CHUNK = 1 << 24


def quantize_weight(
    weight: Tensor,
    group_size: int = GROUP,
    method: str = "search",
    importance: Tensor | None = None,
    bits: int = 4,
) -> QuantizedWeight:
    """Quantize a weight to 4 or 6 bits with an integer (s, a) per group and a float scale per row.

    Rows are quantized independently of each other, so slices along N can be quantized apart. The
    result is deterministic and stays on the weight's device. Columns past K, which fill the last
    group, have q = 0 and no influence.

    It is searched where it lies: a CPU and a GPU differ in about one byte in ten thousand.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        group_size: columns that share (s, a): 32, with 4 bits, 64, 128, or -1 for the whole row.
            The larger ones are stored as groups of 64 with equal parameters.
        method: "search" (least squared error) or "rtn" (the paper's rounding).
        importance: weight of each column in the squared error of the search, ``[K]``, for example
            the mean square of each input feature; equal weights if None.
        bits: of a code: 4, or 6 (see `formats.liquidquant6`).

    Raises:
        TypeError: the weight's dtype is not one of those above.
        ValueError: a wrong shape, group size, method, importance or number of bits, or a weight
            that is NaN, infinite (the message names its row) or on the meta device.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected dtype float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[0] < 1 or not 1 <= weight.shape[1] <= MAX_IN_FEATURES:
        raise ValueError(
            f"weight: expected shape [N, K] with N >= 1 and K from 1 to {MAX_IN_FEATURES}, "
            f"got {list(weight.shape)}"
        )
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {group_size!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
    if group_size == FINE_GROUP and bits != 4:
        raise ValueError(f"group_size: expected 64, 128 or -1 with {bits} bits, got {group_size}")
    if weight.is_meta:
        raise ValueError("weight: expected one with data, got one on the meta device")
    check_finite(weight)
    k = weight.shape[1]
    if importance is not None:
        if method != "search":
            raise ValueError(f"importance: expected None with method {method!r}, got a tensor")
        _check_importance(importance, k)

    span = padded(k) if group_size == -1 else group_size
    column_weight = _column_weight(importance, k, span, weight.device)
    weight = weight.detach()
    q_max = 2**bits - 1

    n, groups = len(weight), padded(k) // _stored(span)
    with torch.inference_mode(False):  # the threads below do not inherit that mode
        outputs = (
            weight.new_empty(n, padded(k), dtype=torch.uint8),
            weight.new_empty(n, groups, dtype=torch.uint8),
            weight.new_empty(n, groups, dtype=torch.uint8),
            weight.new_empty(n, dtype=torch.float32),
        )

    def quantize_rows(chunk: slice) -> None:
        rows = weight[chunk].float()
        sigma = rows.abs().amax(1) / _PROTECTIVE_MAX
        # A row of zeros keeps sigma = 0; any divisor will do for it.
        units = _by_group(rows / torch.where(sigma > 0, sigma, 1).unsqueeze(1), span)
        if method == "rtn":
            s, z, q, refit = _round_to_nearest(units, len(rows), q_max)
        else:
            s, z, q, refit = _search(units, len(rows), column_weight, q_max)
        results = *_to_logical(s, z, q, len(rows), k), sigma * refit
        for output, result in zip(outputs, results, strict=True):
            output[chunk] = result

    _for_chunks(quantize_rows, weight)
    codes, qscale, qoffset, scale = outputs
    if bits == 4:
        return QuantizedWeight(pack_nibbles(codes), qscale, qoffset, scale, k)
    logical = liquidquant6.from_codes(codes, qscale, qoffset)
    return QuantizedWeight(*logical, scale, k, int8.columns_of(k, weight.device))


def _for_chunks(function: Callable[[slice], None], weight: Tensor) -> None:
    """Calls function with slices that cover the rows. They depend on the shape alone."""
    on_cpu = weight.device.type == "cpu"
    step = max(1, (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // weight.shape[1])
    chunks = [slice(start, start + step) for start in range(0, len(weight), step)]
    threads = torch.get_num_threads()
    if not on_cpu:
        for chunk in chunks:
            function(chunk)
        return
    # One thread per chunk, not all threads on one chunk: the search is thousands of operations of
    # some microseconds, and a barrier after each would cost more, on a busy machine a hundred
    # times more. The initializer also reaches settings of the process, so they are set back.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(function, chunks))
    finally:
        torch.set_num_threads(threads)


def check_finite(weight: Tensor) -> None:
    """Raises a ValueError that names the first row of weight ``[N, K]`` with a NaN or infinity."""
    # One pass without temporaries: a NaN anywhere becomes both extrema.
    if all(extremum.isfinite() for extremum in torch.aminmax(weight)):
        return
    row, column = (~weight.isfinite()).nonzero()[0].tolist()
    value = weight[row, column].item()
    raise ValueError(f"weight: expected finite values, got {value} in row {row}")


def _check_importance(importance: Tensor, k: int) -> None:
    if list(importance.shape) != [k]:
        raise ValueError(f"importance: expected shape [{k}], got {list(importance.shape)}")
    bad = ~(importance.isfinite() & (importance >= 0))
    if bad.any():
        column = int(bad.nonzero()[0])
        raise ValueError(
            f"importance: expected finite values >= 0, got {importance[column].item()} "
            f"in column {column}"
        )


# Below, a chunk of R rows lies as [span, R * G]: one column per group, the rows' groups one after
# the other. Parameters are vectors [R * G], so that every operation runs over contiguous memory.


def _stored(span: int) -> int:
    """Columns of a group in the logical tensors."""
    return min(span, GROUP)


def _missing(k: int, span: int) -> int:
    """Columns past K that fill whole groups, and whole blocks."""
    return -k % max(span, GROUP)


def _by_group(rows: Tensor, span: int) -> Tensor:
    """``[R, K]`` to ``[span, R * G]``; what is missing of the last block is filled up with the
    first column of the last group."""
    missing = _missing(rows.shape[1], span)
    if missing:
        filler = rows[:, (rows.shape[1] - 1) // span * span].unsqueeze(1)
        rows = torch.cat((rows, filler.expand(-1, missing)), dim=1)
    return rows.reshape(-1, span).t().contiguous()


def _column_weight(
    importance: Tensor | None, k: int, span: int, device: torch.device
) -> Tensor | None:
    """Weights of the squared errors as ``[span, G]``, zero at padding; None if all are equal."""
    if importance is None:
        if not _missing(k, span):
            return None
        importance = torch.ones(k, device=device)
    weight = importance.to(device, torch.float32)
    weight = weight / weight.max().clamp_min(torch.finfo(torch.float32).tiny)
    return F.pad(weight, (0, _missing(k, span))).view(-1, span).t()


def _round_to_nearest(
    units: Tensor, rows: int, q_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The paper's two roundings of ``units = w / sigma``: s, z, q and a factor 1 for sigma."""
    w8 = units.round().clamp_(-_PROTECTIVE_MAX, _PROTECTIVE_MAX)
    z = w8.amin(0)
    s = (w8.amax(0) - z) / q_max
    # Of the few steps that 6 bits have, the one below would clip a third of the range.
    s = (s.round_() if q_max == Q_MAX else s.ceil_()).clamp_min_(1)
    q = ((w8 - z) / s).round_().clamp_(0, q_max)
    return s, z, q, units.new_ones(rows)


def _search(
    units: Tensor, rows: int, column_weight: Tensor | None, q_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The grid of least squared error for ``units = w / sigma``.

    Returns s and z ``[R * G]``, q ``[span, R * G]`` and the factor ``[R]`` by which sigma changes.
    """
    groups = units.shape[1] // rows
    weight = None if column_weight is None else column_weight.repeat(1, rows)
    if units.is_cpu and _cpu.cpu_kernel() != _cpu.REFERENCE:
        return torch.ops.liquidgemm_cpu.search(units, rows, weight, q_max)
    low, high = units.amin(0), units.amax(0)

    row_error = units.new_full((rows,), torch.inf)
    row_clip = torch.ones_like(row_error)
    best_s, best_z = torch.ones_like(low), torch.zeros_like(low)
    for clip in _CLIPS:
        error, s, z = _search_groups(units, low, high, clip, weight, q_max)
        error = _sum(error.view(rows, groups).t())
        better = error < row_error
        row_error = torch.where(better, error, row_error)
        row_clip = torch.where(better, clip, row_clip)
        better = better.repeat_interleave(groups)
        best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)

    q = _codes(units, best_s, best_z, row_clip.repeat_interleave(groups)).round_()
    q.clamp_(0, q_max)
    # With the integers fixed, the best sigma is a least-squares fit.
    w8 = torch.addcmul(best_z, q, best_s)
    weighted = w8 if weight is None else w8 * weight
    numerator = _sum(_sum(weighted * units).view(rows, groups).t())
    denominator = _sum(_sum(weighted * w8).view(rows, groups).t())
    fits = (numerator > 0) & (denominator > 0)
    return best_s, best_z, q, torch.where(fits, numerator / denominator, row_clip)


def _search_groups(
    units: Tensor, low: Tensor, high: Tensor, clip: float, weight: Tensor | None, q_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The least squared error of each group, and its (s, z), if sigma is scaled by clip."""
    best_error = torch.full_like(low, torch.inf)
    best_s, best_z = torch.ones_like(low), torch.zeros_like(low)
    for s, z in _candidates(low / clip, high / clip, clip == 1, q_max):
        code = _codes(units, s, z, clip)
        error = code.round().clamp_(0, q_max).sub_(code).square_()
        if weight is not None:
            error.mul_(weight)
        error = _sum(error) * (s * clip).square_()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)
    return best_error, best_s, best_z


def _candidates(
    low: Tensor, high: Tensor, anchored: bool, q_max: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Feasible (s, z) for groups that range from low to high, in INT8 units.

    If anchored, those of round-to-nearest are among them, so that the search is never worse.
    """
    cover = ((high - low) / q_max).ceil_()
    most = (_INT8_MAX - _INT8_MIN) // q_max
    centre = (high + low) / 2
    for step_offset in _STEP_OFFSETS:
        s = (cover + step_offset).clamp_(1, most)
        starts = [centre + s * (offset / 3 - q_max / 2) for offset in _CENTRE_OFFSETS]
        if anchored and step_offset in (0, -1):
            starts.append(low)
        for start in starts:
            yield s, torch.minimum(start.round().clamp_min_(_INT8_MIN), _INT8_MAX - q_max * s)


def _sum(x: Tensor) -> Tensor:
    """Sum over dim 0 by halving: unlike torch.sum, in an order that the other dims do not change.

    So a row is quantized to the same bits whatever rows are with it.
    """
    while len(x) > 1:
        half = len(x) // 2
        total = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            total[0] += x[-1]
        x = total
    return x[0]


def _codes(units: Tensor, s: Tensor, z: Tensor, clip: Tensor | float) -> Tensor:
    """``(units / clip - z) / s``: real-valued q."""
    return torch.addcmul(-z / s, units, 1 / (s * clip))


def _to_logical(
    s: Tensor, z: Tensor, q: Tensor, rows: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integral floats in the layout of the search to codes, qscale and qoffset of R rows."""
    span, width = q.shape[0], padded(k)
    # uint8 before the transposition: a quarter of the traffic.
    codes = q.to(torch.uint8).t().reshape(rows, -1)[:, :width].contiguous()
    codes[:, k:] = 0

    def per_group(parameter: Tensor) -> Tensor:
        parameter = parameter.to(torch.uint8).view(rows, -1)
        stored = _stored(span)
        return parameter.repeat_interleave(span // stored, dim=1)[:, : width // stored].contiguous()

    return codes, per_group(s), per_group(z - _INT8_MIN)
