"""Who depends on the batch: our layers, or vLLM's attention."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.05  # of the calls that are looked at
ROWS = 4  # of each
CONTEXTS = (1, 64, 127, 128, 129, 159, 160, 161, 200, 300, 511)


class Seen:
    def __init__(self) -> None:
        self.calls = self.rows = 0
        self.largest = 0  # rows of a call
        self.unlike: list[str] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Of calls of our layers, in an engine without graphs: rows again, each alone."""
    import torch

    from liquidgemm.integrations.vllm.linear import PackedLinearMethod

    seen, numbers, apply = Seen(), random.Random(3), PackedLinearMethod.apply

    def noting(self, layer, x, bias=None):
        y = apply(self, layer, x, bias)
        # Not an activation that came quantized from the op before.
        if not isinstance(x, torch.Tensor) or len(x) < 2 or numbers.random() > SHARE:
            return y
        seen.calls += 1
        seen.largest = max(seen.largest, len(x))
        for i in {len(x) - 1, *numbers.sample(range(len(x)), min(ROWS, len(x)))}:
            seen.rows += 1
            if not torch.equal(apply(self, layer, x[i : i + 1], bias)[0], y[i]):
                seen.unlike.append(f"{self.names[0]}, row {i} of {len(x)}")
        return y

    PackedLinearMethod.apply = noting
    try:
        yield seen
    finally:
        PackedLinearMethod.apply = apply


def require(check, seen: Seen) -> None:
    said = f"{seen.rows} rows of {seen.calls} calls of our layers, of up to {seen.largest} rows"
    check.require(seen.rows > 0 and not seen.unlike, f"{said}, have the bits of the row alone")
    check.note("others", seen.unlike[:20])


def attention(check) -> None:
    """vLLM's attention of one query, in a batch of queries alone and with a prompt beside it."""
    import torch
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    heads, kv_heads, block = 16, 4, 16
    for size in (64, 128):
        generator = torch.Generator("cuda").manual_seed(size)
        options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        k, v = (torch.randn(128, block, kv_heads, size, **options) for _ in range(2))
        q = torch.randn(33, heads, size, **options)
        blocks = torch.arange(64, device="cuda", dtype=torch.int32)
        unlike = []
        for context in CONTEXTS:
            outputs = []
            for lengths, contexts in (((1,), (context,)), ((1, 32), (context, 32))):
                starts = [0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))]
                outputs.append(
                    flash_attn_varlen_func(
                        q[: starts[-1]],
                        k,
                        v,
                        max_seqlen_q=max(lengths),
                        cu_seqlens_q=torch.tensor(starts, device="cuda", dtype=torch.int32),
                        max_seqlen_k=max(contexts),
                        seqused_k=torch.tensor(contexts, device="cuda", dtype=torch.int32),
                        softmax_scale=size**-0.5,
                        causal=True,
                        block_table=torch.stack([blocks, blocks + 64][: len(lengths)]),
                        fa_version=3,
                        num_splits=1,
                    )[0]
                )
            if not torch.equal(*outputs):
                unlike.append(context)
        check.note(f"contexts of which attention of {size} depends on the batch", unlike)
