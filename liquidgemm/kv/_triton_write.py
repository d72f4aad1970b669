"""The kernel that writes keys and values without scales to the cache (`format.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_math import FLOAT


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    k_cache,
    v_cache,
    lengths,
    table,
    tokens,
    heads,
    capacity,
    page_tokens,
    k_strides_b,
    k_strides_t,
    k_strides_h,
    v_strides_b,
    v_strides_t,
    v_strides_h,
    table_stride,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    PAGED: tl.constexpr,
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
        page = tl.load(table + b * table_stride + position // page_tokens, mask, other=0).to(
            tl.int64
        )
    slot = position % page_tokens if PAGED else position
    row = (page * heads + h) * page_tokens + slot
    k_in = k_ptr + b * k_strides_b + index * k_strides_t + h * k_strides_h
    v_in = v_ptr + b * v_strides_b + index * v_strides_t + h * v_strides_h
    d = tl.arange(0, D)
    k_out = k_cache + row[:, None] * D + d[None, :]
    if FORMAT == FLOAT:
        v_out = v_cache + row[:, None] * D + d[None, :]
    else:
        v_out = v_cache + (row - slot % 2)[:, None] * D + 2 * d[None, :] + (slot % 2)[:, None]
    mask2 = mask[:, None]
    k = tl.load(k_in[:, None] + d[None, :], mask2, other=0.0)
    v = tl.load(v_in[:, None] + d[None, :], mask2, other=0.0)
    tl.store(k_out, k.to(k_cache.dtype.element_ty), mask2)
    tl.store(v_out, v.to(v_cache.dtype.element_ty), mask2)
