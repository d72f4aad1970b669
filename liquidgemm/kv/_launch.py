"""Launches Triton's kernels, for caches without scales: which configuration, which grid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _triton_attention, _triton_math, _triton_write
from .format import BY_CODES, capacity_of, head_dim_of

_CONSTANTS = {
    "bfloat16": _triton_math.FLOAT,
    "float16": _triton_math.FLOAT,
    "fp8": _triton_math.FP8,
}
MAX_CHUNKS = 64
CTAS_PER_SM = 16  # more chunks than that are shared out among as many CTAs
COMBINE_TILE = 8


@dataclass(frozen=True)
class Config:
    """How decode attention is worked on: by head_dim and rows, never by batch or length.

    Attributes:
        block: tokens per step.
        chunk: tokens whose partial result one CTA computes (`_triton_attention._chunk_tokens`).
        warps, stages: Triton's.
    """

    block: int
    chunk: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.chunk % self.block:
            raise ValueError(f"chunk: expected a multiple of {self.block}, got {self.chunk}")


def config_of(head_dim: int, rows: int) -> Config:
    if head_dim == 256 or rows > 32:
        return Config(32, 256, 4, 3)
    return Config(64, 256, 4, 3)


@functools.cache
def _sms(device: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < (9, 0):
        raise RuntimeError(
            f"k_cache: expected on a GPU of compute capability 9.0 or later, got cuda:{device} "
            f"({properties.name}, {properties.major}.{properties.minor})"
        )
    return properties.multi_processor_count


def write(
    k, v, k_cache, v_cache, k_params, v_params, lengths, block_table=None, k_center=None
) -> None:
    """Parameters and center are None, in these formats."""
    fmt = BY_CODES[k_cache.dtype]
    batch, new, heads, head_dim = k.shape
    if k.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    tile = 1 if new < 16 else 8
    with _on(k_cache):
        _triton_write.write_kernel[(-(-new // tile), heads, batch)](
            k,
            v,
            k_cache,
            v_cache,
            lengths,
            block_table,
            new,
            heads,
            capacity_of(k_cache, block_table),
            k_cache.shape[2],
            *k.stride()[:3],
            *v.stride()[:3],
            0 if block_table is None else block_table.shape[1],
            FORMAT=_CONSTANTS[fmt.name],
            D=head_dim,
            PAGED=block_table is not None,
            TILE=tile,
            num_warps=1 if tile == 1 else 4,
        )


def attention(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_params: Tensor | None,
    v_params: Tensor | None,
    lengths: Tensor,
    scale: float,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    config: Config | None = None,
    interpreted: bool = False,
) -> Tensor:
    """Writes ``out``, and returns it. With `interpreted`, by Triton's interpreter on a CPU."""
    if out.numel() == 0:
        return out
    fmt = BY_CODES[k_cache.dtype]
    batch, queries, q_heads, _ = q.shape
    head_dim, heads = head_dim_of(k_cache), k_cache.shape[1]
    group = q_heads // heads
    used = queries * group
    if q.dtype not in (torch.bfloat16, torch.float16):
        q = q.to(torch.bfloat16)
    if fmt.name != "fp8":
        q = q.to(k_cache.dtype)
    q = q if q.stride(-1) == 1 else q.contiguous()
    config = config or config_of(head_dim, used)
    capacity, page_tokens = capacity_of(k_cache, block_table), k_cache.shape[2]
    max_chunks = max(1, min(MAX_CHUNKS, -(-capacity // config.chunk)))
    sms = 132 if interpreted else _sms(k_cache.device.index)
    ctas = min(max_chunks, max(8, -(-CTAS_PER_SM * sms // (batch * heads))))
    space = (batch, heads, max_chunks)
    partial = q.new_empty((*space, used, head_dim), dtype=torch.float32)
    stats = q.new_empty((*space, 2, used), dtype=torch.float32)
    masks = {"HAS_STARTS": starts is not None, "HAS_WINDOW": window > 0}
    shape = {"QUERIES": queries, "GROUP": group, "BLOCK": config.block, "CHUNK": config.chunk}
    with _on(k_cache):
        _triton_attention.decode_kernel[(ctas, heads, batch)](
            q,
            k_cache,
            v_cache.view(torch.int16).squeeze(-1) if fmt.together == 2 else v_cache,
            lengths,
            block_table,
            starts,
            partial,
            stats,
            scale * math.log2(math.e),
            softcap * math.log2(math.e),
            window,
            heads,
            capacity,
            max_chunks,
            page_tokens,
            *q.stride()[:3],
            0 if block_table is None else block_table.shape[1],
            FORMAT=_CONSTANTS[fmt.name],
            D=head_dim,
            PAGED=block_table is not None,
            WHOLE_BLOCKS=block_table is not None and page_tokens % config.block == 0,
            HAS_SOFTCAP=softcap > 0,
            ROWS=max(16, 1 << (used - 1).bit_length()),
            MAX_CHUNKS=MAX_CHUNKS,
            # With a block table, a load waits for another: as many buffers take more stages.
            STAGES=config.stages if block_table is None else 2 * config.stages - 1,
            PTX=not interpreted,
            **masks,
            **shape,
            num_warps=config.warps,
        )
        _triton_attention.combine_kernel[(used, heads, batch)](
            partial,
            stats,
            out,
            lengths,
            starts,
            window,
            heads,
            capacity,
            max_chunks,
            D=head_dim,
            MAX_CHUNKS=MAX_CHUNKS,
            TILE=COMBINE_TILE,
            PTX=not interpreted,
            **masks,
            **shape,
            num_warps=1,
            **({} if interpreted else {"launch_pdl": True}),
        )
    return out


def _on(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
