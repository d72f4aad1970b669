"""Decode attention over caches of bfloat16, float16 and fp8 in Triton, and the combination of its
partial results.

Imported on first use: Triton is part of torch's CUDA builds and of no others. By its interpreter
(TRITON_INTERPRET=1) the kernels run on CPU tensors, without inline PTX.

One CTA per chunk of one sequence and one key head. All query rows that share the key head (its
group of heads, times the query tokens) are the M dimension of both products. A block holds BLOCK
consecutive tokens, worked on as BLOCK / 2 pairs: even tokens and odd tokens are two halves with two
dots each, since values of fp8 are stored in pairs (`format.py`). A chunk's partial result is a
function of that chunk alone; `combine_kernel` adds them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._triton_math import FLOAT, FP8, dot_floats


@triton.jit
def _prefetch(addresses):
    """Asks for the lines of 128 bytes, in L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _chunk_tokens(length, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Tokens per chunk: CHUNK, or more where MAX_CHUNKS of those do not cover the sequence."""
    return tl.maximum(CHUNK, tl.cdiv(tl.cdiv(length, MAX_CHUNKS), BLOCK) * BLOCK)


@triton.jit
def _rows_of(token, b, h, heads, table, table_stride, mask, page_tokens, PAGED: tl.constexpr):
    """Where tokens of sequence b and head h are among all rows of the cache."""
    page = b
    if PAGED:
        page = tl.load(table + b * table_stride + token // page_tokens, mask).to(tl.int64)
        token = token % page_tokens
    return (page * heads + h) * page_tokens + token


@triton.jit
def decode_kernel(
    q_ptr,
    k_cache,
    v_cache,
    lengths,
    table,
    starts,
    partial,  # float32 [B, heads, max_chunks, ROWS_USED, D]
    stats,  # float32 [B, heads, max_chunks, 2, ROWS_USED]: maximum (log2), sum
    scale_log2,
    softcap_log2,
    window,
    heads,
    capacity,
    max_chunks,
    page_tokens,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    table_stride,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    PAGED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,  # a block lies in one page
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,  # not by the interpreter
):
    """Program (i, h, b) takes chunks i, i + programs, ... of key head h of sequence b."""
    if PTX:
        gdc_launch_dependents()
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), capacity)

    HALF: tl.constexpr = BLOCK // 2
    USED: tl.constexpr = QUERIES * GROUP
    rows = tl.arange(0, ROWS)
    chunk = _chunk_tokens(length, BLOCK, CHUNK, MAX_CHUNKS)
    limit = length - QUERIES + rows // GROUP  # the last token that a row sees: its own
    first = tl.zeros([ROWS], tl.int32)
    if HAS_STARTS:
        first += tl.load(starts + b).to(tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(first, limit - window + 1)
    lo = tl.maximum(tl.min(first, 0), 0)

    if PTX:  # asks for all of the first chunk: memory is busy while the queries are prepared
        begin = tl.maximum((lo // chunk + tl.program_id(0)) * chunk, lo // BLOCK * BLOCK)
        end = tl.minimum((lo // chunk + tl.program_id(0) + 1) * chunk, length)
        BYTES: tl.constexpr = 2 * D if FORMAT == FLOAT else D
        PER_ROW: tl.constexpr = (BYTES + 127) // 128  # lines
        lines = tl.arange(0, 128)
        for first_line in range(0, (end - begin) * PER_ROW, 128):
            line = tl.minimum(first_line + lines, (end - begin) * PER_ROW - 1)
            row = _rows_of(
                begin + line // PER_ROW, b, h, heads, table, table_stride, None, page_tokens, PAGED
            )
            offset = row * BYTES + line % PER_ROW * 128
            _prefetch(k_cache.to(tl.int64) + offset)
            _prefetch(v_cache.to(tl.int64) + offset)

    d = tl.arange(0, D)
    q_rows = q_ptr + b * q_stride_b + (rows // GROUP) * q_stride_t
    q_rows += (h * GROUP + rows % GROUP) * q_stride_h
    q_mask = (rows < USED)[:, None]
    q_scale = tl.full([ROWS], 1.0, tl.float32)
    q = tl.load(q_rows[:, None] + d[None, :], q_mask, other=0.0)
    if FORMAT == FP8:
        amax = tl.max(tl.abs(q.to(tl.float32)), 1)
        q_scale = tl.where(amax > 0, amax / 448.0, 1.0)
        q = (q.to(tl.float32) / q_scale[:, None]).to(k_cache.dtype.element_ty)
    q_scale *= scale_log2

    pairs = tl.arange(0, HALF)
    for index in range(lo // chunk + tl.program_id(0), tl.cdiv(length, chunk), tl.num_programs(0)):
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, HALF], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        begin = tl.maximum(index * chunk, lo // BLOCK * BLOCK)
        end = tl.minimum((index + 1) * chunk, length)
        for token in tl.range(begin, end, BLOCK, num_stages=STAGES):
            even = token + 2 * pairs
            odd = even + 1
            pair_mask = even < end
            odd_mask = odd < end
            if WHOLE_BLOCKS:
                row = _rows_of(token, b, h, heads, table, table_stride, None, page_tokens, PAGED)
                row += 2 * pairs
            else:
                row = _rows_of(
                    even, b, h, heads, table, table_stride, pair_mask, page_tokens, PAGED
                )
            k_even = tl.load(k_cache + row[:, None] * D + d[None, :], pair_mask[:, None], other=0.0)
            k_odd = tl.load(
                k_cache + (row + 1)[:, None] * D + d[None, :], odd_mask[:, None], other=0.0
            )
            if FORMAT == FLOAT:
                v = tl.load(v_cache + row[:, None] * D + d[None, :], pair_mask[:, None], other=0.0)
                v_odd = tl.load(
                    v_cache + (row + 1)[:, None] * D + d[None, :], odd_mask[:, None], other=0.0
                )
            else:
                v = tl.load(
                    v_cache + (row // 2)[:, None] * D + d[None, :], pair_mask[:, None], other=0
                )
            s_even = dot_floats(q, tl.trans(k_even), tl.zeros([ROWS, HALF], tl.float32), PTX)
            s_odd = dot_floats(q, tl.trans(k_odd), tl.zeros([ROWS, HALF], tl.float32), PTX)
            s_even *= q_scale[:, None]
            s_odd *= q_scale[:, None]
            if HAS_SOFTCAP:  # cap * tanh(s / cap), by the exponential
                inside = 2 * 1.4426950408889634 / softcap_log2
                s_even = softcap_log2 * (1 - 2 / (tl.exp2(s_even * inside) + 1))
                s_odd = softcap_log2 * (1 - 2 / (tl.exp2(s_odd * inside) + 1))
            see_even = (even[None, :] <= limit[:, None]) & pair_mask[None, :]
            see_odd = (odd[None, :] <= limit[:, None]) & odd_mask[None, :]
            if HAS_STARTS or HAS_WINDOW:
                see_even &= even[None, :] >= first[:, None]
                see_odd &= odd[None, :] >= first[:, None]
            s_even = tl.where(see_even, s_even, float("-inf"))
            s_odd = tl.where(see_odd, s_odd, float("-inf"))

            new_m = tl.maximum(m, tl.max(tl.maximum(s_even, s_odd), 1))
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)
            alpha = tl.exp2(m - shift)
            m = new_m
            p_even = tl.exp2(s_even - shift[:, None])
            p_odd = tl.exp2(s_odd - shift[:, None])
            total = total * alpha[:, None] + (p_even + p_odd)
            acc *= alpha[:, None]
            if FORMAT == FP8:
                # The odd byte of the last pair may be stale, and a NaN.
                v_odd = tl.where(odd_mask[:, None], v >> 8, 0).to(tl.int8)
                v_even = v.to(tl.int8).to(k_cache.dtype.element_ty, bitcast=True).to(tl.float16)
                v_odd = v_odd.to(k_cache.dtype.element_ty, bitcast=True).to(tl.float16)
                acc = dot_floats(p_even.to(tl.float16), v_even, acc, PTX)
                acc = dot_floats(p_odd.to(tl.float16), v_odd, acc, PTX)
            else:
                acc = dot_floats(p_even.to(v.dtype), v, acc, PTX)
                acc = dot_floats(p_odd.to(v.dtype), v_odd, acc, PTX)

        place = ((b * heads + h) * max_chunks + index) * USED
        out = partial + (place + rows)[:, None] * D + d[None, :]
        stat = stats + 2 * place + rows
        tl.store(out, acc, q_mask)
        tl.store(stat, m, rows < USED)
        tl.store(stat + USED, tl.sum(total, 1), rows < USED)


@triton.jit
def combine_kernel(
    partial,
    stats,
    out,  # [B, QUERIES, heads * GROUP, D], contiguous
    lengths,
    starts,
    window,
    heads,
    capacity,
    max_chunks,
    D: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Program (r, h, b) adds the chunks of row r of key head h of sequence b."""
    if PTX:
        gdc_wait()
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    row = tl.program_id(0)
    USED: tl.constexpr = QUERIES * GROUP
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), capacity)
    first = 0
    if HAS_STARTS:
        first = tl.load(starts + b).to(tl.int32)
    if HAS_WINDOW:  # as in decode_kernel: the first token that any row sees
        first = tl.maximum(first, length - QUERIES - window + 1)
    chunk = _chunk_tokens(length, BLOCK, CHUNK, MAX_CHUNKS)
    begin = tl.maximum(first, 0) // chunk
    end = tl.cdiv(length, chunk)

    base = (b * heads + h) * max_chunks
    all_chunks = tl.arange(0, MAX_CHUNKS)
    used = (all_chunks >= begin) & (all_chunks < end)
    stat = stats + 2 * (base + all_chunks) * USED + row
    m = tl.load(stat, used, other=float("-inf"))
    total = tl.load(stat + USED, used, other=0.0)
    most = tl.max(m, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(total * tl.exp2(m - most), 0)

    d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    for start in range(begin // TILE * TILE, end, TILE):
        chunks = start + tl.arange(0, TILE)
        mask = (chunks >= begin) & (chunks < end)
        largest = tl.load(stats + 2 * (base + chunks) * USED + row, mask, other=float("-inf"))
        weight = tl.exp2(largest - most)
        values = tl.load(
            partial + ((base + chunks) * USED + row)[:, None] * D + d[None, :],
            mask[:, None],
            other=0.0,
        )
        acc += tl.sum(values * weight[:, None], 0)
    acc = tl.where(total == 0, 0.0, acc / total)  # a row that sees no token gives zeros
    place = ((b * QUERIES + row // GROUP) * heads + h) * GROUP + row % GROUP
    tl.store(out + place * D + d, acc.to(out.dtype.element_ty))
