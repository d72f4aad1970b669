"""The kernel that quantizes keys and values and writes them to the cache (`format.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_math import (
    FLOAT,
    INT4,
    INT8,
    bf16_not_below,
    is_finite,
    rint,
    rotate,
    rotate_halves,
)


@triton.jit
def _int8(x):
    """Codes int32 and scale float32 of rows float32 [R, D]."""
    amax = tl.max(tl.abs(x), 1)
    bad = tl.max(tl.where(is_finite(x), 0, 1), 1) > 0
    scale = bf16_not_below(tl.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32)))
    scale = tl.where(bad, float("nan"), scale)
    usable = scale > 0
    divisor = tl.where(usable, scale, 1.0)[:, None]
    codes = rint(tl.div_rn(x, tl.broadcast_to(divisor, x.shape)))
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.where(usable[:, None], codes, 0.0).to(tl.int32), scale


@triton.jit
def _int4_codes(x, scale, zero, usable):
    divisor = tl.broadcast_to(tl.where(usable, scale, 1.0)[:, None], x.shape)
    codes = rint(tl.div_rn(x, divisor)) + zero[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0)
    return tl.where(usable[:, None], codes, 0.0).to(tl.int32)


@triton.jit
def _int4(low, high):
    """Bytes int32 and parameters int32 of rows whose halves are low and high, float32 [R, D/2]."""
    least = tl.minimum(tl.minimum(tl.min(low, 1), tl.min(high, 1)), 0.0)
    most = tl.maximum(tl.maximum(tl.max(low, 1), tl.max(high, 1)), 0.0)
    bad = tl.max(tl.where(is_finite(low) & is_finite(high), 0, 1), 1) > 0
    scale = bf16_not_below(tl.div_rn(most - least, tl.full(most.shape, 15.0, tl.float32)))
    scale = tl.where(bad, float("nan"), scale)
    usable = scale > 0
    zero = rint(tl.div_rn(-least, tl.where(usable, scale, 1.0)))
    zero = tl.where(usable, zero, 0.0)
    codes = _int4_codes(low, scale, zero, usable) | (_int4_codes(high, scale, zero, usable) << 4)
    return codes, (scale.to(tl.int32, bitcast=True) & -65536) | zero.to(tl.int32)


@triton.jit
def _store_params(params, row, FORMAT: tl.constexpr, scale_or_word, mask):
    if FORMAT == INT8:
        tl.store(params + row, scale_or_word.to(tl.bfloat16), mask)
    else:
        tl.store(params + row, scale_or_word, mask)


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    k_cache,
    v_cache,
    k_params,
    v_params,
    lengths,
    table,
    center,
    tokens,
    heads,
    capacity,
    k_strides_b,
    k_strides_t,
    k_strides_h,
    v_strides_b,
    v_strides_t,
    v_strides_h,
    table_stride,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    CENTERED: tl.constexpr,
    SHARED: tl.constexpr,  # one center for all sequences
    TILE: tl.constexpr,
):
    """Program (i, h, b) writes TILE of the new tokens of head h of sequence b."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(lengths + b).to(tl.int32) - tokens + index
    mask = (index < tokens) & (position >= 0) & (position < capacity)
    page = b
    if PAGED:
        page = tl.load(table + b * table_stride + position // PAGE, mask, other=0).to(tl.int64)
    slot = position % PAGE if PAGED else position
    row = (page * heads + h) * PAGE + slot  # one row of K, and one parameter, per token and head
    k_in = k_ptr + b * k_strides_b + index * k_strides_t + h * k_strides_h
    v_in = v_ptr + b * v_strides_b + index * v_strides_t + h * v_strides_h
    W: tl.constexpr = D // 2 if FORMAT == INT4 else D  # elements of a row
    d = tl.arange(0, W)
    k_out = k_cache + row[:, None] * W + d[None, :]
    if FORMAT == FLOAT:
        v_out = v_cache + row[:, None] * W + d[None, :]
    else:
        v_out = v_cache + (row - slot % 2)[:, None] * W + 2 * d[None, :] + (slot % 2)[:, None]
    mask2 = mask[:, None]
    k = tl.load(k_in[:, None] + d[None, :], mask2, other=0.0)
    v = tl.load(v_in[:, None] + d[None, :], mask2, other=0.0)
    if CENTERED:
        center += h * D if SHARED else (b * heads + h) * D
        k = k.to(tl.float32) - tl.load(center + d)[None, :]
    if FORMAT < INT8:
        tl.store(k_out, k.to(k_cache.dtype.element_ty), mask2)
        tl.store(v_out, v.to(v_cache.dtype.element_ty), mask2)
    elif FORMAT == INT8:
        codes, scale = _int8(rotate(k.to(tl.float32), TILE, D))
        tl.store(k_out, codes.to(tl.int8), mask2)
        _store_params(k_params, row, FORMAT, scale, mask)
        codes, scale = _int8(v.to(tl.float32))
        tl.store(v_out, codes.to(tl.int8), mask2)
        _store_params(v_params, row, FORMAT, scale, mask)
    else:
        high = tl.load(k_in[:, None] + W + d[None, :], mask2, other=0.0)
        if CENTERED:
            high = high.to(tl.float32) - tl.load(center + W + d)[None, :]
        codes, word = _int4(*rotate_halves(k.to(tl.float32), high.to(tl.float32), TILE, W))
        tl.store(k_out, codes.to(tl.uint8), mask2)
        _store_params(k_params, row, FORMAT, word, mask)
        high = tl.load(v_in[:, None] + W + d[None, :], mask2, other=0.0)
        codes, word = _int4(*rotate_halves(v.to(tl.float32), high.to(tl.float32), TILE, W))
        tl.store(v_out, codes.to(tl.uint8), mask2)
        _store_params(v_params, row, FORMAT, word, mask)
