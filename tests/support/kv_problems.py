"""Caches that are written and poisoned, and attention over them in float64, token by token."""

import torch
from torch import Tensor

from liquidgemm.kv import KVCache


def poison_(cache: KVCache) -> KVCache:
    """Every byte 0xff: a NaN in every floating-point format."""
    for tensor in cache.tensors:
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    return cache


def rows(*shape: int, seed: int, dtype=torch.bfloat16, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    starts: list[int] | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """float64 ``[B, L, query heads, D]`` of q and of k and v ``[B, H, T, D]``, query by query."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[2] // k.shape[1]
    for b, length in enumerate(lengths):
        for i in range(q.shape[1]):
            token = length - q.shape[1] + i
            first = max(0 if starts is None else starts[b], token - window + 1 if window else 0)
            if first > token:
                continue
            for head in range(q.shape[2]):
                keys = k[b, head // group, first : token + 1].double()
                scores = keys @ q[b, i, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                p = scores.softmax(0)
                out[b, i, head] = p @ v[b, head // group, first : token + 1].double()
    return out


def paged_copy(cache: KVCache, page_tokens: int, seed: int) -> tuple[KVCache, Tensor]:
    """The same tokens in pages that are scattered among poisoned ones, and the block table."""
    sequences, heads, tokens = cache.k.shape[:3]
    per_sequence = tokens // page_tokens
    pages = 2 * sequences * per_sequence
    device = cache.k.device
    copy = poison_(
        KVCache.allocate(cache.format.name, pages, heads, page_tokens, cache.head_dim, device)
    )
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    table = order[: sequences * per_sequence].view(sequences, per_sequence)
    for of, to in zip(cache.tensors, copy.tensors, strict=True):
        if of is None:
            continue
        whole = of.view(torch.uint8) if of.itemsize == 1 else of
        pieces = whole.unflatten(2, (per_sequence, -1)).transpose(1, 2).flatten(0, 1)
        target = to.view(torch.uint8) if to.itemsize == 1 else to
        target[table.flatten().to(device)] = pieces
    return copy, table.to(torch.int32).to(device)


def same_bits(one: KVCache, two: KVCache) -> bool:
    """Whether all bytes are equal, but for the payload of NaNs among the scales."""
    return all(
        a is None or torch.equal(_comparable(a), _comparable(b))
        for a, b in zip(one.tensors, two.tensors, strict=True)
    )


def _comparable(tensor: Tensor) -> Tensor:
    if tensor.dim() == 3 and tensor.dtype.is_floating_point:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.view(torch.uint8)
