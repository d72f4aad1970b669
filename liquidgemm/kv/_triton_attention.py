"""Decode attention over the KV cache in Triton, and the combination of its partial results.

Imported on first use: Triton is part of torch's CUDA builds and of no others. By its interpreter
(TRITON_INTERPRET=1) the kernels run on CPU tensors, without inline PTX.

Decode attention, one CTA per chunk of one sequence and one key head. All query rows that share the
key head (its group of heads, times the query tokens) are the M dimension of both products:

    scores   codes of q, INT8  x  codes of K         -> INT32, exact
             (dot - qsum * zero) * (q_scale * scale) * k_scale, in float32
    output   bf16(p * v_scale)  x  codes of V, as bf16 -> float32

A block holds BLOCK consecutive tokens, worked on as BLOCK / 2 pairs: even tokens and odd tokens are
two halves with two dots each, since V is stored in pairs (`format.py`). So every value that a
tensor core reads of V is 16 bits wide in shared memory, and bytes become bf16 in registers.
A chunk's partial result is a function of that chunk alone; `combine_kernel` adds them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._triton_math import (
    FLOAT,
    FP8,
    INT4,
    INT8,
    bytes_as_bf16,
    dot_floats,
    hadamard_matrix,
    is_finite,
    nibbles,
    nibbles_as_bf16,
    rint,
    rotate,
)


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
def _rows_of(
    token, b, h, heads, table, table_stride, mask, PAGED: tl.constexpr, PAGE: tl.constexpr
):
    """Where tokens of sequence b and head h are among all rows of the cache."""
    page = b
    if PAGED:
        page = tl.load(table + b * table_stride + token // PAGE, mask).to(tl.int64)
        token = token % PAGE
    return (page * heads + h) * PAGE + token


@triton.jit
def _scales(params, row, pair_mask, odd_mask, FORMAT: tl.constexpr):
    """Scales and zero points, float32, of the even and the odd tokens of pairs; 0 where masked."""
    if FORMAT == INT8:
        word = tl.load(params + row // 2, pair_mask, other=0)  # two bfloat16
        even = word << 16
        odd = tl.where(odd_mask, word & -65536, 0)
    else:
        even = tl.load(params + row, pair_mask, other=0)
        odd = tl.load(params + row + 1, odd_mask, other=0)
    return (
        (even & -65536).to(tl.float32, bitcast=True),
        (odd & -65536).to(tl.float32, bitcast=True),
        (even & 15).to(tl.float32),  # of int4 alone
        (odd & 15).to(tl.float32),
    )


@triton.jit
def decode_kernel(
    q_ptr,
    k_cache,
    v_cache,
    k_params,
    v_params,
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
    q_stride_b,
    q_stride_t,
    q_stride_h,
    table_stride,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
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
    PREFETCH: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, h, b) takes chunks i, i + programs, ... of key head h of sequence b."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), capacity)

    HALF: tl.constexpr = BLOCK // 2
    W: tl.constexpr = D // 2 if FORMAT == INT4 else D
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

    if PREFETCH:  # memory is busy while the queries are prepared
        begin = tl.maximum((lo // chunk + tl.program_id(0)) * chunk, lo // BLOCK * BLOCK)
        end = tl.minimum((lo // chunk + tl.program_id(0) + 1) * chunk, length)
        BYTES: tl.constexpr = 2 * D if FORMAT == FLOAT else W
        PER_ROW: tl.constexpr = (BYTES + 127) // 128  # lines
        lines = tl.arange(0, 128)
        for first_line in range(0, (end - begin) * PER_ROW, 128):
            line = tl.minimum(first_line + lines, (end - begin) * PER_ROW - 1)
            row = _rows_of(
                begin + line // PER_ROW, b, h, heads, table, table_stride, None, PAGED, PAGE
            )
            offset = row * BYTES + line % PER_ROW * 128
            _prefetch(k_cache.to(tl.int64) + offset)
            _prefetch(v_cache.to(tl.int64) + offset)

    # The queries of all rows, rotated and quantized as the format asks for: q, for int4 its halves.
    d = tl.arange(0, W)
    q_rows = q_ptr + b * q_stride_b + (rows // GROUP) * q_stride_t
    q_rows += (h * GROUP + rows % GROUP) * q_stride_h
    q_mask = (rows < USED)[:, None]
    q_scale = tl.full([ROWS], 1.0, tl.float32)
    if FORMAT >= INT8:
        H: tl.constexpr = D // 2
        half = tl.arange(0, H)
        low = tl.load(q_rows[:, None] + half[None, :], q_mask, other=0.0)
        high = tl.load(q_rows[:, None] + H + half[None, :], q_mask, other=0.0)
        # As `rotate_halves`, by a tensor core: products with 1 and -1 are exact.
        hadamard = hadamard_matrix(H, q_ptr.dtype.element_ty)
        none = tl.zeros([ROWS, H], tl.float32)
        low, high = dot_floats(low, hadamard, none, PTX), dot_floats(high, hadamard, none, PTX)
        low, high = low + high, low - high
        most = tl.maximum(tl.abs(low), tl.abs(high))
        finite = tl.min((is_finite(low) & is_finite(high)).to(tl.int32), 1)
        q_scale = tl.div_rn(tl.max(most, 1), tl.full([ROWS], 127.0, tl.float32))
        q_scale = tl.where(finite > 0, q_scale, float("nan"))
        usable = (q_scale > 0)[:, None]
        divisor = tl.broadcast_to(tl.where(usable, q_scale[:, None], 1.0), low.shape)
        low = tl.where(usable, rint(tl.div_rn(low, divisor)), 0.0)
        high = tl.where(usable, rint(tl.div_rn(high, divisor)), 0.0)
        qsum = tl.sum(low + high, 1)
        if FORMAT == INT4:
            q, q2 = low.to(tl.int8), high.to(tl.int8)
        else:
            q = tl.permute(tl.join(low.to(tl.int8), high.to(tl.int8)), [0, 2, 1])
            q = tl.reshape(q, [ROWS, D])
        q_scale *= 1 / D  # of the rotations of q and k
    else:
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
        zeros = tl.zeros([ROWS, HALF], tl.float32)  # sum of p * zero point
        acc = tl.zeros([ROWS, W], tl.float32)
        acc2 = tl.zeros([ROWS, W], tl.float32)
        begin = tl.maximum(index * chunk, lo // BLOCK * BLOCK)
        end = tl.minimum((index + 1) * chunk, length)
        for token in tl.range(begin, end, BLOCK, num_stages=STAGES):
            even = token + 2 * pairs
            odd = even + 1
            pair_mask = even < end
            odd_mask = odd < end
            if PAGED and PAGE % BLOCK == 0:  # one page for the block
                row = _rows_of(token, b, h, heads, table, table_stride, None, PAGED, PAGE)
                row += 2 * pairs
            else:
                row = _rows_of(even, b, h, heads, table, table_stride, pair_mask, PAGED, PAGE)
            k_even = tl.load(k_cache + row[:, None] * W + d[None, :], pair_mask[:, None], other=0.0)
            k_odd = tl.load(
                k_cache + (row + 1)[:, None] * W + d[None, :], odd_mask[:, None], other=0.0
            )
            if FORMAT == FLOAT:
                v = tl.load(v_cache + row[:, None] * W + d[None, :], pair_mask[:, None], other=0.0)
                v_odd = tl.load(
                    v_cache + (row + 1)[:, None] * W + d[None, :], odd_mask[:, None], other=0.0
                )
            else:
                v = tl.load(
                    v_cache + (row // 2)[:, None] * W + d[None, :], pair_mask[:, None], other=0
                )
            if FORMAT >= INT8:
                ks_even, ks_odd, kz_even, kz_odd = _scales(
                    k_params, row, pair_mask, odd_mask, FORMAT
                )
                vs_even, vs_odd, vz_even, vz_odd = _scales(
                    v_params, row, pair_mask, odd_mask, FORMAT
                )

            if FORMAT == INT4:
                k_low, k_high = nibbles(k_even, PTX)
                dot = tl.dot(q, tl.trans(k_low), out_dtype=tl.int32)
                dot = tl.dot(q2, tl.trans(k_high), dot, out_dtype=tl.int32)
                s_even = dot.to(tl.float32) - qsum[:, None] * kz_even[None, :]
                k_low, k_high = nibbles(k_odd, PTX)
                dot = tl.dot(q, tl.trans(k_low), out_dtype=tl.int32)
                dot = tl.dot(q2, tl.trans(k_high), dot, out_dtype=tl.int32)
                s_odd = dot.to(tl.float32) - qsum[:, None] * kz_odd[None, :]
            elif FORMAT == INT8:
                s_even = tl.dot(q, tl.trans(k_even), out_dtype=tl.int32).to(tl.float32)
                s_odd = tl.dot(q, tl.trans(k_odd), out_dtype=tl.int32).to(tl.float32)
            else:
                s_even = dot_floats(q, tl.trans(k_even), tl.zeros([ROWS, HALF], tl.float32), PTX)
                s_odd = dot_floats(q, tl.trans(k_odd), tl.zeros([ROWS, HALF], tl.float32), PTX)
            s_even *= q_scale[:, None]
            s_odd *= q_scale[:, None]
            if FORMAT >= INT8:
                s_even *= ks_even[None, :]
                s_odd *= ks_odd[None, :]
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
            if FORMAT >= INT8:
                p_even = (p_even * vs_even[None, :]).to(tl.bfloat16)
                p_odd = (p_odd * vs_odd[None, :]).to(tl.bfloat16)
            if FORMAT == INT4:
                acc2 *= alpha[:, None]
                even_low, even_high, odd_low, odd_high = nibbles_as_bf16(v, PTX)
                acc = dot_floats(p_even, even_low, acc, PTX)
                acc2 = dot_floats(p_even, even_high, acc2, PTX)
                acc = dot_floats(p_odd, odd_low, acc, PTX)
                acc2 = dot_floats(p_odd, odd_high, acc2, PTX)
                zeros = zeros * alpha[:, None] + (
                    p_even.to(tl.float32) * vz_even[None, :]
                    + p_odd.to(tl.float32) * vz_odd[None, :]
                )
            elif FORMAT == INT8:
                v_even, v_odd = bytes_as_bf16(v, PTX)
                acc = dot_floats(p_even, v_even, acc, PTX)
                acc = dot_floats(p_odd, v_odd, acc, PTX)
            elif FORMAT == FP8:
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
        if FORMAT == INT4:
            correction = tl.sum(zeros, 1)[:, None]
            tl.store(out, acc - correction, q_mask)
            tl.store(out + W, acc2 - correction, q_mask)
        else:
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
    ROTATED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (r, h, b) adds the chunks of row r of key head h of sequence b."""
    if PDL:
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
    if ROTATED:
        acc = tl.reshape(rotate(tl.reshape(acc, [1, D]), 1, D), [D]) * (1 / D)
    acc = tl.where(total == 0, 0.0, acc / total)  # a row that sees no token gives zeros
    place = ((b * QUERIES + row // GROUP) * heads + h) * GROUP + row % GROUP
    tl.store(out + place * D + d, acc.to(out.dtype.element_ty))
