"""The KV cache's kernels: codes as on a CPU, attention as in float64, and what must not matter."""

import dataclasses

import pytest
import torch
from kv_problems import dense_attention, paged_copy, poison_, rows, same_bits

from liquidgemm.kv import KVCache, _ops
from liquidgemm.kv.format import FORMATS

pytest.importorskip("triton", reason="triton is not installed")

CODED = ["int8", "int4"]


def filled(
    name: str, lengths: list[int], heads: int = 2, tokens: int = 1024, head_dim: int = 128
) -> tuple[KVCache, torch.Tensor]:
    """A cache on the GPU that is poisoned but for the tokens of each sequence, and the lengths."""
    cache = poison_(KVCache.allocate(name, len(lengths), heads, tokens, head_dim, "cuda"))
    on_gpu = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    k, v = (
        rows(len(lengths), max(lengths), heads, head_dim, seed=seed, device="cuda")
        for seed in (1, 2)
    )
    cache.write_(k, 3 * v, on_gpu)
    return cache, on_gpu


def on_cpu(cache: KVCache) -> KVCache:
    return KVCache(*(None if one is None else one.cpu() for one in cache.tensors))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_write_equals_the_cpu(name: str, head_dim: int, dtype: torch.dtype) -> None:
    """CHECKLIST 8: every code and scale to the bit, special rows as well; few tokens and many."""
    lengths = torch.tensor([50, 7, 33], dtype=torch.int32)
    k, v = (rows(3, 33, 2, head_dim, seed=seed, dtype=dtype) for seed in (3, 4))
    k *= torch.logspace(-5, 4, 33)[None, :, None, None].to(dtype)
    k[0, 1], v[0, 2] = 0, 0
    if name in CODED:
        k[0, 3, 0, 5], v[1, 30, 1, 7] = float("nan"), float("inf")
        k[2, 4] = 1e-40  # a denormal, where there are any
    here, there = (poison_(KVCache.allocate(name, 3, 2, 64, head_dim, d)) for d in ("cpu", "cuda"))
    here.write_(k, v, lengths)
    there.write_(k.cuda(), v.cuda(), lengths.cuda())
    assert same_bits(here, on_cpu(there))
    one = slice(32, 33)
    here.write_(k[:, one], v[:, one], lengths + 1)
    there.write_(k[:, one].cuda(), v[:, one].cuda(), lengths.cuda() + 1)
    assert same_bits(here, on_cpu(there))
    if name in CODED:
        for sequences in (1, 3):
            center = rows(sequences, 2, head_dim, seed=5, dtype=torch.float32)
            for one in (here, there):
                centered = dataclasses.replace(one, k_center=center.to(one.k.device))
                centered.write_(*(x.to(one.k.device) for x in (k, v, lengths)))
            assert same_bits(here, on_cpu(there))


def check(cache: KVCache, lengths: torch.Tensor, q: torch.Tensor, **options) -> None:
    """Attention against float64 over the cache as it is read on the CPU, queries as they are
    rounded there: what is left is the rounding of probabilities and of the output."""
    rounded = _ops.query_rows(q.cpu(), cache.format)
    expected = dense_attention(rounded, *on_cpu(cache).read(), lengths.tolist(), 0.1, **options)
    if options.get("starts"):
        options["starts"] = torch.tensor(options["starts"], dtype=torch.int32, device="cuda")
    out = cache.attention(q, lengths, 0.1, **options).cpu()
    assert not out.isnan().any()
    # bfloat16 has 8 bits; fp8 rounds the queries to 4, and codes of int8 may flip at ties.
    tolerance = 0.1 if cache.format.name == "fp8" else 0.015
    error = (out - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-6)
    worst = error.argmax().item()
    place = [i.item() for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert error.max() <= tolerance, (place, error.max().item(), cache.format.name, options)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 20])
def test_attention(name: str, head_dim: int, group: int) -> None:
    """CHECKLIST 6: every kind of length, beside poisoned memory."""
    lengths = [1, 2, 63, 64, 65, 255, 256, 257, 1000, 1024]
    cache, on_gpu = filled(name, lengths, head_dim=head_dim)
    q = rows(len(lengths), 1, 2 * group, head_dim, seed=5, device="cuda")
    check(cache, on_gpu, q)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    "options",
    [{"window": 100}, {"window": 1}, {"softcap": 20.0}, {"starts": [0, 1, 255, 300, 639]}],
    ids=str,
)
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_attention_options(name: str, options: dict, queries: int) -> None:
    lengths = [5, 256, 257, 301, 640]
    cache, on_gpu = filled(name, lengths, tokens=640)
    q = rows(len(lengths), queries, 8, 128, seed=6, device="cuda")
    check(cache, on_gpu, q, **options)


@pytest.mark.parametrize("name", CODED)
def test_a_long_sequence(name: str) -> None:
    """Longer than MAX_CHUNKS chunks of the usual size."""
    lengths = [40_001, 20_000]
    cache, on_gpu = filled(name, lengths, heads=1, tokens=40_960)
    check(cache, on_gpu, rows(2, 1, 4, 128, seed=7, device="cuda"))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("page_tokens", [2, 16, 64, 256])
def test_pages_change_nothing(name: str, page_tokens: int) -> None:
    """CHECKLIST 9: to the bit, wherever the pages are, beside poisoned ones."""
    lengths = [1, 300, 511, 512]
    cache, on_gpu = filled(name, lengths, tokens=512)
    q = rows(len(lengths), 1, 8, 128, seed=8, device="cuda")
    expected = cache.attention(q, on_gpu)
    paged, table = paged_copy(cache, page_tokens, seed=9)
    assert torch.equal(paged.attention(q, on_gpu, block_table=table), expected)


@pytest.mark.parametrize("name", list(FORMATS))
def test_batch_invariance(name: str) -> None:
    """CHECKLIST 9: a sequence alone, in another place, and with another capacity: the same bits."""
    lengths = [700, 3, 256, 1000, 64] * 8
    cache, on_gpu = filled(name, lengths, tokens=1024)
    q = rows(len(lengths), 1, 8, 128, seed=10, device="cuda")
    together = cache.attention(q, on_gpu)
    for b in (0, 3, 17, 39):
        alone = KVCache(*(None if x is None else x[b : b + 1] for x in cache.tensors))
        assert torch.equal(alone.attention(q[b : b + 1], on_gpu[b : b + 1])[0], together[b])
    larger = poison_(KVCache.allocate(name, len(lengths), 2, 20_000, 128, "cuda"))
    for of, to in zip(cache.tensors, larger.tensors, strict=True):
        if of is not None:
            to.view(torch.uint8)[:, :, : of.shape[2]] = of.view(torch.uint8)
    assert torch.equal(larger.attention(q, on_gpu), together)
    assert torch.equal(cache.attention(q, on_gpu), together)


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_graph_of_a_growing_sequence(name: str) -> None:
    """CHECKLIST 12: a step that writes and attends is replayed with other lengths and inputs."""
    steps = 70
    cache = poison_(KVCache.allocate(name, 2, 2, 512, 128, "cuda"))
    eager = poison_(KVCache.allocate(name, 2, 2, 512, 128, "cuda"))
    lengths = torch.tensor([230, 1], dtype=torch.int32, device="cuda")
    k, v = (rows(2, 230, 2, 128, seed=seed, device="cuda") for seed in (1, 2))
    for one in (cache, eager):
        one.write_(k, v, lengths)
    x = torch.zeros(2, 1, 2, 128, dtype=torch.bfloat16, device="cuda")
    q = torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16, device="cuda")

    def step(of: KVCache, at: torch.Tensor) -> torch.Tensor:
        at.add_(1)
        of.write_(x, x, at)
        return of.attention(q, at)

    other = lengths.clone()
    step(eager, other.clone())  # compiles, and is written over below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(cache, lengths)
    for i in range(steps):
        x.copy_(rows(2, 1, 2, 128, seed=100 + i))
        q.copy_(rows(2, 1, 8, 128, seed=200 + i))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, step(eager, other)), i
    assert same_bits(on_cpu(cache), on_cpu(eager))


def test_the_host_does_not_wait() -> None:
    """CHECKLIST 21"""
    cache, lengths = filled("int8", [100, 7])
    q, x = (rows(2, 1, heads, 128, seed=12, device="cuda") for heads in (8, 2))
    cache.write_(x, x, lengths)
    cache.attention(q, lengths)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.write_(x, x, lengths)
        cache.attention(q, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
