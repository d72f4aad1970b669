"""The ops `kv_write_` and `kv_attention`: schemas, checks, and their CPU path in plain torch.

On CUDA, int8 and int4 run the kernels of the CUDA library (csrc/liquidgemm/attention), the others
Triton's (`_launch`), which are imported when an op is first called with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import _autograd, _registry
from ..ops._checks import require, require_device, require_dtype, require_shape
from .format import (
    BY_CODES,
    HEAD_DIMS,
    PAGE_MULTIPLE,
    Format,
    capacity_of,
    dequantize,
    head_dim_of,
    pack_codes,
    quantize,
    rotate,
    shapes,
    unpack_rows,
)

INPUTS = (torch.bfloat16, torch.float16, torch.float32)
MAX_ROWS = 64  # query heads per key head, times query tokens
QUERY_STEPS = 127 * 256 + 127  # of the largest element of a query, where keys are coded


def check_cache(
    k: Tensor,
    v: Tensor,
    k_params: Tensor | None,
    v_params: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
) -> int:
    """Checks what both ops are given of a cache, and returns its head_dim."""
    require_dtype("k_cache", k, *BY_CODES)
    fmt = BY_CODES[k.dtype]
    require(k.dim() == 4, "k_cache", "4 dimensions, [P, H, T, D]", f"shape {list(k.shape)}")
    pages, heads, tokens, _ = k.shape
    head_dim = head_dim_of(k)
    names = " or ".join(map(str, HEAD_DIMS))
    require(head_dim in HEAD_DIMS, "k_cache", f"a head_dim of {names}", head_dim)
    expected = f"a multiple of {PAGE_MULTIPLE} tokens per page"
    require(tokens % PAGE_MULTIPLE == 0, "k_cache", expected, tokens)
    k_shape, v_shape, p_shape = shapes(fmt, pages, heads, tokens, head_dim)
    require_dtype("v_cache", v, k.dtype)
    require_shape("v_cache", v, list(v_shape), f" for a k_cache of {list(k_shape)}")
    for name, params in (("k_params", k_params), ("v_params", v_params)):
        if p_shape is None or fmt.params is None:
            require(params is None, name, f"None for {fmt.name}", "a tensor")
        elif params is None:
            require(False, name, f"a tensor for {fmt.name}", "None")
        else:
            require_dtype(name, params, fmt.params)
            require_shape(name, params, list(p_shape))
    require_dtype("lengths", lengths, torch.int32)
    require(lengths.dim() == 1, "lengths", "shape [B]", f"shape {list(lengths.shape)}")
    if block_table is None:
        got = f"{lengths.shape[0]} lengths"
        require(lengths.shape[0] == pages, "lengths", f"one for each of {pages} sequences", got)
    else:
        require_dtype("block_table", block_table, torch.int32)
        require_shape("block_table", block_table, [lengths.shape[0], block_table.shape[-1]])
    for name, tensor in (
        ("k_cache", k),
        ("v_cache", v),
        ("k_params", k_params),
        ("v_params", v_params),
        ("block_table", block_table),
        ("lengths", lengths),
    ):
        if tensor is not None:
            require_device(name, tensor, "k_cache", k.device)
            require(tensor.is_contiguous(), name, "a contiguous tensor", "another layout")
    return head_dim


def check_rows(name: str, x: Tensor, k: Tensor, lengths: Tensor) -> None:
    """Of q, or the new keys or values: ``[B, L, heads, D]``."""
    require_dtype(name, x, *INPUTS)
    require(x.dim() == 4, name, "4 dimensions, [B, L, heads, D]", f"shape {list(x.shape)}")
    expected = [lengths.shape[0], x.shape[1], x.shape[2], head_dim_of(k)]
    require_shape(name, x, expected, ", [B, L, heads, D]")
    require_device(name, x, "k_cache", k.device)


def _write_fake(
    k, v, k_cache, v_cache, k_params, v_params, lengths, block_table=None, k_center=None
) -> None:
    check_cache(k_cache, v_cache, k_params, v_params, lengths, block_table)
    for name, x in (("k", k), ("v", v)):
        check_rows(name, x, k_cache, lengths)
        require_shape(name, x, [*k.shape[:2], k_cache.shape[1], k.shape[3]], ", [B, L, H, D]")
        require_dtype(name, x, k.dtype)
    if k_center is not None:
        fmt = BY_CODES[k_cache.dtype]
        require(fmt.params is not None, "k_center", f"None for {fmt.name}", "a tensor")
        require_dtype("k_center", k_center, torch.float32)
        rows = [k_center.shape[0] if k_center.dim() else 0, *k.shape[2:]]
        require_shape("k_center", k_center, rows)
        expected = f"1 or {k.shape[0]} rows"
        require(k_center.shape[0] in (1, k.shape[0]), "k_center", expected, k_center.shape[0])
        require_device("k_center", k_center, "k_cache", k_cache.device)
        require(k_center.is_contiguous(), "k_center", "a contiguous tensor", "another layout")


def _check_attention(
    q,
    k_cache,
    v_cache,
    k_params,
    v_params,
    lengths,
    scale,
    block_table=None,
    starts=None,
    window=0,
    softcap=0.0,
) -> None:
    check_cache(k_cache, v_cache, k_params, v_params, lengths, block_table)
    check_rows("q", q, k_cache, lengths)
    heads = k_cache.shape[1]
    _, queries, q_heads, _ = q.shape
    require(q_heads % heads == 0, "q", f"a multiple of {heads} heads", f"{q_heads} heads")
    rows = queries * (q_heads // heads)
    got = f"{queries} tokens x {q_heads // heads} heads"
    require(rows <= MAX_ROWS, "q", f"at most {MAX_ROWS} tokens x heads per key head", got)
    if starts is not None:
        require_dtype("starts", starts, torch.int32)
        require_shape("starts", starts, [lengths.shape[0]])
        require_device("starts", starts, "k_cache", k_cache.device)
        require(starts.is_contiguous(), "starts", "a contiguous tensor", "another layout")
    require(window >= 0, "window", "0 (none) or a number of tokens", window)
    require(softcap >= 0, "softcap", "0 (none) or a positive number", softcap)


def _attention_fake(q, *cache_and_options) -> Tensor:
    _check_attention(q, *cache_and_options)
    return q.new_empty(q.shape)


# -- CPU --------------------------------------------------------------------------------------


def _write_cpu(
    k, v, k_cache, v_cache, k_params, v_params, lengths, block_table=None, k_center=None
) -> None:
    arguments = (k_cache, v_cache, k_params, v_params, lengths, block_table, k_center)
    _write_fake(k, v, *arguments)
    if k_center is not None:
        k = k.float() - k_center[:, None]
    fmt = BY_CODES[k_cache.dtype]
    batch, new = k.shape[:2]
    page_tokens, capacity = k_cache.shape[2], capacity_of(k_cache, block_table)
    position = lengths.long()[:, None] - new + torch.arange(new)
    inside = (position >= 0) & (position < capacity)
    position = position.clamp(0, max(capacity - 1, 0))
    sequence = torch.arange(batch)[:, None].expand_as(position)
    table = torch.arange(batch)[:, None] if block_table is None else block_table.long()
    page = table[sequence, position // page_tokens][inside]
    slot = (position % page_tokens)[inside]
    for x, cache, params, values in (
        (k, k_cache, k_params, False),
        (v, v_cache, v_params, True),
    ):
        codes, new_params = quantize(x, fmt, values)
        codes = pack_codes(codes, fmt)[inside]
        if codes.itemsize == 1:  # indexing does not know float8
            codes = codes.view(torch.uint8)
        target = cache.view(codes.dtype)
        if values and fmt.together > 1:
            target[page, :, slot // fmt.together, :, slot % fmt.together] = codes
        else:
            target[page, :, slot] = codes
        if params is not None and new_params is not None:
            params[page, :, slot] = new_params[inside]


def read(
    k_cache: Tensor,
    v_cache: Tensor,
    k_params: Tensor | None,
    v_params: Tensor | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values as float32 ``[B, H, capacity, D]``, with whatever is past the lengths."""
    fmt = BY_CODES[k_cache.dtype]

    def gather(tensor: Tensor) -> Tensor:
        if block_table is None:
            return tensor
        pages = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        pages = pages[block_table.long()]  # [B, pages of a sequence, H, ...]
        return pages.transpose(1, 2).flatten(2, 3).view(tensor.dtype)

    parts = ((k_cache, k_params, False), (v_cache, v_params, True))
    k, v = (
        dequantize(
            unpack_rows(gather(cache), fmt, values),
            None if params is None else gather(params),
            fmt,
            values,
        )
        for cache, params, values in parts
    )
    return k, v


def _attention_cpu(
    q,
    k_cache,
    v_cache,
    k_params,
    v_params,
    lengths,
    scale,
    block_table=None,
    starts=None,
    window=0,
    softcap=0.0,
) -> Tensor:
    arguments = (k_cache, v_cache, k_params, v_params, lengths)
    out = _attention_fake(q, *arguments, scale, block_table, starts, window, softcap)
    heads, capacity = k_cache.shape[1], capacity_of(k_cache, block_table)
    queries, group = q.shape[1], q.shape[2] // heads
    used = min(capacity, int(lengths.max())) if lengths.numel() else 0
    k, v = (x[:, :, :used] for x in read(k_cache, v_cache, k_params, v_params, block_table))
    rows = query_rows(q, BY_CODES[k_cache.dtype])
    rows = rows.unflatten(2, (heads, group)).permute(0, 2, 1, 3, 4)  # [B, H, L, group, D]
    token = torch.arange(used)
    last = lengths.clamp(max=capacity)[:, None] - queries + torch.arange(queries)  # [B, L]
    first = torch.zeros_like(last) if starts is None else starts[:, None].expand_as(last)
    if window:
        first = torch.maximum(first, last - window + 1)
    seen = (token <= last[..., None]) & (token >= first[..., None])  # [B, L, used]
    seen = seen[:, None, :, None]
    # What no query sees may be anything, such as a NaN.
    ever = seen.any(2)[:, :, 0, :, None]
    k, v = torch.where(ever, k, 0), torch.where(ever, v, 0)
    scores = torch.einsum("bhlgd,bhtd->bhlgt", rows, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(seen, scores, -math.inf)
    p = scores.softmax(-1)
    p = torch.where(seen.any(-1, keepdim=True), p, 0)  # a query that sees nothing gives zeros
    result = torch.einsum("bhlgt,bhtd->bhlgd", p, v)
    return out.copy_(result.permute(0, 2, 1, 3, 4).flatten(2, 3))


def query_rows(q: Tensor, fmt: Format) -> Tensor:
    """Queries in float32 as they meet the keys: in QUERY_STEPS if those are coded."""
    q = q.float()
    if fmt.params is None:
        return q
    q = rotate(q) if fmt.rotates_k else q
    step = q.abs().amax(-1, keepdim=True) / QUERY_STEPS
    q = torch.where(step == 0, 0, (q / step).round() * step)
    return rotate(q) / q.shape[-1] if fmt.rotates_k else q


# -- CUDA -------------------------------------------------------------------------------------


def _write_cuda(k, v, k_cache, *cache) -> None:
    _write_fake(k, v, k_cache, *cache)
    if BY_CODES[k_cache.dtype].params is not None:
        _registry.require_cuda_library("kv_write_")
        torch.ops.liquidgemm_kv.write_(k, v, k_cache, *cache)
        return
    from ._launch import write

    write(k, v, k_cache, *cache)


def _attention_cuda(q, k_cache, *cache_and_options) -> Tensor:
    _check_attention(q, k_cache, *cache_and_options)
    if BY_CODES[k_cache.dtype].params is not None:
        _registry.require_cuda_library("kv_attention")
        return torch.ops.liquidgemm_kv.attention(q, k_cache, *cache_and_options)
    from ._launch import attention

    return attention(q.new_empty(q.shape), q, k_cache, *cache_and_options)


_registry.define(
    "kv_write_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_params, "
    "Tensor(d!)? v_params, Tensor lengths, Tensor? block_table=None, "
    "Tensor? k_center=None) -> ()",
    _write_fake,
    _autograd.not_differentiable("kv_write_"),
    cuda=_write_cuda,
)
_registry.define(
    "kv_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_params, Tensor? v_params, "
    "Tensor lengths, float scale, Tensor? block_table=None, Tensor? starts=None, int window=0, "
    "float softcap=0.) -> Tensor",
    _attention_fake,
    _autograd.not_differentiable("kv_attention"),
    cuda=_attention_cuda,
)
_registry.LIB.impl("kv_write_", _write_cpu, "CPU")
_registry.LIB.impl("kv_attention", _attention_cpu, "CPU")
