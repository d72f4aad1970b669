"""A layer's keys and values in a quantized cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops
from .format import BY_CODES, FORMATS, PAGE_MULTIPLE, Format, head_dim_of, shapes


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, in the layouts of `liquidgemm.kv.format`.

    `allocate` makes one; engines may give tensors of their own. A contiguous cache has a page for
    each sequence. Of a paged one, page ``block_table[b, i]`` holds tokens ``i * T`` to
    ``(i + 1) * T - 1`` of sequence b.

    In all methods ``lengths``, int32 ``[B]``, is how many tokens each sequence has, those of the
    call included. They are read where they are, on the device: nothing waits for it, and a CUDA
    graph is replayed with other lengths. A length beyond the capacity, which is T or T times the
    columns of the block table, counts as the capacity, and tokens beyond it are not written.

    Attributes:
        k, v: codes.
        k_params, v_params: their scales (and zero points); None in bfloat16, float16 and fp8.
        k_center: what is subtracted from the keys of int8 and int4 before they are coded, float32
            ``[1 or B, H, D]``, or None. The softmax does not see it, a softcap does.
    """

    k: Tensor
    v: Tensor
    k_params: Tensor | None = None
    v_params: Tensor | None = None
    k_center: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        format: str,
        pages: int,
        heads: int,
        tokens: int,
        head_dim: int,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """A cache full of zeros.

        Args:
            format: "int8", "int4", "fp8", "bfloat16" or "float16".
            pages: sequences of a contiguous cache, or pages of a paged one.
            heads: of keys and values.
            tokens: per page; rounded up to a multiple of 16.
            head_dim: 64, 128 or 256.

        Raises:
            ValueError: another format or head_dim.
        """
        if format not in FORMATS:
            raise ValueError(f"format: expected {' or '.join(FORMATS)}, got {format!r}")
        if head_dim not in _ops.HEAD_DIMS:
            names = " or ".join(map(str, _ops.HEAD_DIMS))
            raise ValueError(f"head_dim: expected {names}, got {head_dim}")
        fmt = FORMATS[format]
        tokens = -(-tokens // PAGE_MULTIPLE) * PAGE_MULTIPLE
        k, v, params = shapes(fmt, pages, heads, tokens, head_dim)

        def zero_params() -> Tensor | None:
            return None if params is None else torch.zeros(params, dtype=fmt.params, device=device)

        return cls(
            torch.zeros(k, dtype=fmt.codes, device=device),
            torch.zeros(v, dtype=fmt.codes, device=device),
            zero_params(),
            zero_params(),
        )

    @property
    def format(self) -> Format:
        return BY_CODES[self.k.dtype]

    @property
    def head_dim(self) -> int:
        return head_dim_of(self.k)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.k, self.v, self.k_params, self.v_params

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.tensors if one is not None)

    def write_(
        self, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None = None
    ) -> None:
        """Quantize and store the last L tokens of each sequence.

        The codes do not depend on what else is in the call, and are the same on CPU and GPU.

        Args:
            k, v: bfloat16, float16 or float32 ``[B, L, heads, D]``: of the tokens
                ``lengths[b] - L`` to ``lengths[b] - 1``.
            lengths: int32 ``[B]``.
            block_table: int32 ``[B, pages of a sequence]``, of a paged cache.

        Raises:
            RuntimeError: wrong shapes, dtypes or devices.
        """
        torch.ops.liquidgemm.kv_write_(k, v, *self.tensors, lengths, block_table, self.k_center)

    def attention(
        self,
        q: Tensor,
        lengths: Tensor,
        scale: float | None = None,
        block_table: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention of the last L tokens of each sequence to all that is before them.

        Query i of L is that of token ``t = lengths[b] - L + i`` and sees the tokens
        ``max(starts[b], t - window + 1)`` to t. Where keys are quantized, queries are too, in steps
        of ``max|q| / 32639`` (rotated as the keys are): scores are exact integers times scales. The
        result of a sequence does not depend on the others to the bit, nor on the
        capacity, on whether the cache is paged, or on where its pages are.

        Args:
            q: bfloat16, float16 or float32 ``[B, L, query heads, D]``, at most 64 of (L times query
                heads per key head).
            lengths: int32 ``[B]``.
            scale: of the scores; by default ``1 / sqrt(D)``.
            block_table: int32 ``[B, pages of a sequence]``, of a paged cache.
            starts: int32 ``[B]``: tokens at the beginning that are padding.
            window: how many tokens a query sees, itself included; 0 for all.
            softcap: if not 0, scores become ``softcap * tanh(score / softcap)``.

        Returns:
            ``[B, L, query heads, D]`` with the dtype of q; zeros where a query sees no token.

        Raises:
            RuntimeError: wrong shapes, dtypes or devices.
            ValueError: a softcap over keys with a center.
        """
        if softcap and self.k_center is not None:
            raise ValueError(f"softcap: expected 0 where keys have a center, got {softcap}")
        scale = self.head_dim**-0.5 if scale is None else scale
        return torch.ops.liquidgemm.kv_attention(
            q, *self.tensors, lengths, scale, block_table, starts, window, softcap
        )

    def read(self, block_table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values as float32 ``[B, heads, capacity, D]``, dequantized.

        What is past the length of a sequence is whatever the memory holds.
        """
        k, v = _ops.read(*self.tensors, block_table)
        return (k if self.k_center is None else k + self.k_center[:, :, None]), v
