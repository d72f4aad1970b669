"""The KV cache's kernels: codes as on a CPU, attention as in float64, and what must not matter.

int8 and int4 are kernels of the library, the other formats Triton's, which are compiled when they
are first needed: few variants of those are tried.
"""

import dataclasses
import importlib.util

import pytest
import torch
from kv_problems import dense_attention, paged_copy, poison_, rows, same_bits

from liquidgemm.kv import KVCache, _ops

HAS_TRITON = importlib.util.find_spec("triton") is not None
CODED = ["int8", "int4"]


def of_triton(name: str, *more):
    mark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
    return pytest.param(name, *more, marks=mark)


ALL = [*CODED, of_triton("bfloat16"), of_triton("fp8")]


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


def queries(name: str, *shape: int, seed: int) -> torch.Tensor:
    """In float32 for codes, so that nothing is rounded but what the kernel itself rounds."""
    dtype = torch.float32 if name in CODED else torch.bfloat16
    return rows(*shape, seed=seed, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        *[
            (name, head_dim, dtype)
            for name in CODED
            for head_dim in (64, 128, 256)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ],
        of_triton("bfloat16", 128, torch.float32),
        of_triton("float16", 64, torch.bfloat16),
        of_triton("fp8", 128, torch.bfloat16),
    ],
)
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
    for new in (1, 2, 5):
        last = slice(33 - new, 33)
        here.write_(k[:, last], v[:, last], lengths + new)
        there.write_(k[:, last].cuda(), v[:, last].cuda(), lengths.cuda() + new)
        assert same_bits(here, on_cpu(there)), new
    if name in CODED:
        for sequences in (1, 3):
            center = rows(sequences, 2, head_dim, seed=5, dtype=torch.float32)
            for one in (here, there):
                centered = dataclasses.replace(one, k_center=center.to(one.k.device))
                centered.write_(*(x.to(one.k.device) for x in (k, v, lengths)))
            assert same_bits(here, on_cpu(there))


@pytest.mark.parametrize("name", CODED)
def test_nothing_else_is_written(name: str) -> None:
    """CHECKLIST 6: beyond the capacity, before the first token, of pages of others."""
    cache = poison_(KVCache.allocate(name, 5, 2, 16, 64, "cuda"))
    table = torch.tensor([[3, 1]], dtype=torch.int32, device="cuda")
    x = rows(1, 30, 2, 64, seed=3, device="cuda")
    cache.write_(x, x, torch.tensor([40], dtype=torch.int32, device="cuda"), table)  # 10 ... 31
    bits = [tensor.view(torch.uint8).flatten(1) for tensor in cache.tensors if tensor is not None]
    for page in (0, 2, 4):
        assert all((one[page] == 0xFF).all() for one in bits)
    k, v = on_cpu(KVCache(*cache.tensors)).read(table.cpu())
    for one in (k, v):
        assert one[0, :, :10].isnan().all()
        assert one[0, :, 10:].isfinite().all()
    before = [one.clone() for one in bits]
    cache.write_(x, x, torch.tensor([80], dtype=torch.int32, device="cuda"), table)  # 50 ... 79
    assert all(torch.equal(*pair) for pair in zip(bits, before, strict=True))


# Of the same weights' sum of the values' magnitudes: weights of codes have 15 bits, bfloat16 has 8,
# and fp8 rounds the queries to 4.
TOLERANCE = {"int8": 2e-4, "int4": 2e-4, "bfloat16": 0.01, "float16": 0.01, "fp8": 0.1}


def check(cache: KVCache, lengths: torch.Tensor, q: torch.Tensor, **options) -> None:
    """Attention against float64 over the cache as it is read on the CPU, queries as they are
    rounded there: what is left is the rounding of probabilities and of the output."""
    rounded = _ops.query_rows(q.cpu(), cache.format)
    k, v = on_cpu(cache).read()
    expected, magnitude = (
        dense_attention(rounded, k, values, lengths.tolist(), 0.1, **options)
        for values in (v, v.abs())
    )
    if options.get("starts"):
        options["starts"] = torch.tensor(options["starts"], dtype=torch.int32, device="cuda")
    out = cache.attention(q, lengths, 0.1, **options).cpu()
    assert not out.isnan().any()
    error = (out - expected).abs().amax(-1) / magnitude.amax(-1).clamp_min(1e-6)
    worst = error.argmax().item()
    place = [i.item() for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    name = cache.format.name
    assert error.max() <= TOLERANCE[name], (place, error.max().item(), name, options)


@pytest.mark.parametrize(
    ("name", "head_dim", "group"),
    [
        *[
            (name, head_dim, group)
            for name in CODED
            for head_dim in (64, 128, 256)
            for group in (1, 4, 7, 16, 20)
        ],
        of_triton("bfloat16", 128, 4),
        of_triton("float16", 64, 7),
        of_triton("fp8", 256, 20),
    ],
)
def test_attention(name: str, head_dim: int, group: int) -> None:
    """CHECKLIST 6, 32: every kind of length, beside poisoned memory."""
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 1000, 1024]
    cache, on_gpu = filled(name, lengths, head_dim=head_dim)
    check(cache, on_gpu, queries(name, len(lengths), 1, 2 * group, head_dim, seed=5))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """The float32 result, rounded once; rows of q may lie anywhere."""
    cache, on_gpu = filled(name, [300, 17])
    q = rows(2, 1, 8, 128, seed=5, dtype=dtype, device="cuda")
    out = cache.attention(q, on_gpu)
    assert torch.equal(out, cache.attention(q.float(), on_gpu).to(dtype))
    apart = torch.full((2, 3, 9, 200), float("nan"), dtype=dtype, device="cuda")
    apart[:, 1:2, 1:, 8:136] = q
    assert torch.equal(cache.attention(apart[:, 1:2, 1:, 8:136], on_gpu), out)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(cache.attention(turned, on_gpu), out)


OPTIONS = [{"window": 100}, {"window": 1}, {"softcap": 20.0}, {"starts": [0, 1, 255, 300, 639]}]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [(name, tokens) for name in CODED for tokens in (1, 2, 5)] + [of_triton("bfloat16", 5)],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_options(name: str, options: dict, tokens: int) -> None:
    lengths = [5, 256, 257, 301, 640]
    cache, on_gpu = filled(name, lengths, tokens=640)
    check(cache, on_gpu, queries(name, len(lengths), tokens, 8, 128, seed=6), **options)


@pytest.mark.parametrize("name", CODED)
def test_a_long_sequence(name: str) -> None:
    """CHECKLIST 32: longer than 64 chunks of the usual size."""
    lengths = [40_001, 20_000]
    cache, on_gpu = filled(name, lengths, heads=1, tokens=40_960)
    check(cache, on_gpu, queries(name, 2, 1, 4, 128, seed=7))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("steepness", [1, 4, 20])
@pytest.mark.parametrize("falling", [False, True])
def test_scores_and_scales_of_all_sizes(name: str, steepness: float, falling: bool) -> None:
    """Token by token larger scores and values, or smaller ones: sums change their unit."""
    tokens, heads, group = 512, 2, 4  # whole chunks, so that warps see several blocks
    q = queries(name, 1, 1, heads * group, 128, seed=15)
    k = rows(1, tokens, heads, 128, seed=16, dtype=torch.float32, device="cuda")
    growth = torch.linspace(0, steepness, tokens, device="cuda")[None, :, None, None]
    growth = growth.flip(1) if falling else growth
    k += growth * q.unflatten(2, (heads, group)).mean(3)
    v = rows(1, tokens, heads, 128, seed=17, dtype=torch.float32, device="cuda") * 2.0**growth
    cache = poison_(KVCache.allocate(name, 1, heads, tokens, 128, "cuda"))
    lengths = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    cache.write_(k, v, lengths)
    check(cache, lengths, q)


@pytest.mark.parametrize("name", CODED)
def test_rows_of_nan_and_zero(name: str) -> None:
    """A NaN in a key, a value or a query is one of the results that see it, and of no other; a
    value of zeros weighs nothing, and changes no other's precision."""
    cache, on_gpu = filled(name, [300, 300, 300, 300])
    q = queries(name, 4, 2, 8, 128, seed=18)
    bad = rows(1, 1, 2, 128, seed=19, device="cuda")
    bad[0, 0, 1, 5] = float("nan")
    good = rows(1, 1, 2, 128, seed=20, device="cuda")

    def one(b: int) -> KVCache:
        return KVCache(*(None if x is None else x[b : b + 1] for x in cache.tensors))

    one(0).write_(bad, good, on_gpu[:1])  # the last token: the second query alone sees it
    one(1).write_(good, bad, on_gpu[:1])
    q[2, 0, 3, 7] = float("nan")
    out = cache.attention(q, on_gpu).isnan()
    expected = torch.zeros_like(out)
    expected[:2, 1, 4:] = True
    expected[2, 0, 3] = True
    assert torch.equal(out, expected)
    sink = q[3:, :1].unflatten(2, (2, 4)).mean(3) * 30
    one(3).write_(sink, torch.zeros_like(sink), on_gpu[:1] - 250)
    check(one(3), on_gpu[:1], q[3:])


@pytest.mark.parametrize("name", CODED)
def test_a_sequence_that_sees_nothing_gives_zeros(name: str) -> None:
    cache = poison_(KVCache.allocate(name, 2, 2, 64, 128, "cuda"))
    lengths = torch.tensor([0, 40], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 40], dtype=torch.int32, device="cuda")
    x = rows(2, 40, 2, 128, seed=21, device="cuda")
    cache.write_(x, x, torch.tensor([0, 40], dtype=torch.int32, device="cuda"))
    assert not cache.attention(queries(name, 2, 1, 8, 128, seed=22), lengths, starts=starts).any()


@pytest.mark.parametrize(
    ("name", "page_tokens"),
    [(name, tokens) for name in CODED for tokens in (16, 48, 64, 256)]
    + [of_triton("bfloat16", 16), of_triton("fp8", 64)],
)
def test_pages_change_nothing(name: str, page_tokens: int) -> None:
    """CHECKLIST 9, 32: to the bit, wherever the pages are, beside poisoned ones."""
    lengths = [1, 300, 511, 512, 768]
    cache, on_gpu = filled(name, lengths, tokens=768)
    q = queries(name, len(lengths), 1, 8, 128, seed=8)
    expected = cache.attention(q, on_gpu)
    paged, table = paged_copy(cache, page_tokens, seed=9)
    assert torch.equal(paged.attention(q, on_gpu, block_table=table), expected)


def enlarged(cache: KVCache, tokens: int) -> KVCache:
    """The same with room for so many tokens of each sequence."""
    name = cache.format.name
    batch, heads = cache.k.shape[:2]
    larger = poison_(KVCache.allocate(name, batch, heads, tokens, 128, "cuda"))
    for pair in zip(cache.tensors, larger.tensors, strict=True):
        if pair[0] is not None:
            of, to = (x.view(torch.uint8) if x.itemsize == 1 else x for x in pair)
            to[:, :, : of.shape[2]] = of
    return larger


@pytest.mark.parametrize("name", CODED)
def test_where_no_sequence_is_long(name: str) -> None:
    """CHECKLIST 9: one launch finishes them; the same bits as with room for more, and zeros of an
    empty sequence, where there were others."""
    cache, lengths = filled(name, [200, 256, 17], tokens=256)
    lengths[2] = 0
    q = queries(name, 3, 2, 8, 128, seed=23)
    expected = enlarged(cache, 4096).attention(q, lengths)
    torch.full_like(q, torch.nan)  # where the result is going to be
    out = cache.attention(q, lengths)
    assert torch.equal(out, expected)
    assert not out[2].any()


@pytest.mark.parametrize("name", ALL)
def test_batch_invariance(name: str) -> None:
    """CHECKLIST 9: a sequence alone, in another place, and with another capacity: the same bits."""
    lengths = [700, 3, 256, 1000, 64] * 8
    cache, on_gpu = filled(name, lengths, tokens=1024)
    q = queries(name, len(lengths), 1, 8, 128, seed=10)
    together = cache.attention(q, on_gpu)
    for b in (0, 3, 17, 39):
        alone = KVCache(*(None if x is None else x[b : b + 1] for x in cache.tensors))
        assert torch.equal(alone.attention(q[b : b + 1], on_gpu[b : b + 1])[0], together[b])
    assert torch.equal(enlarged(cache, 20_000).attention(q, on_gpu), together)
    for _ in range(20):  # CHECKLIST 10
        assert torch.equal(cache.attention(q, on_gpu), together)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 20.0}], ids=str)
def test_how_codes_are_copied_changes_no_bit(name: str, group: int, options: dict) -> None:
    """Many sequences are copied in bulk, few by lines; pages of 16 tokens, lengths of all kinds."""
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 640]
    few, few_lengths = filled(name, lengths, heads=2, tokens=640)
    few, table = paged_copy(few, 16, seed=9)
    q = queries(name, len(lengths), 1, 2 * group, 128, seed=10)
    repeats = 80  # 3040 pairs of a sequence and a head: more than 16 for each SM
    many = few.attention(
        q.repeat(repeats, 1, 1, 1),
        few_lengths.repeat(repeats),
        block_table=table.repeat(repeats, 1),
        **options,
    )
    alone = few.attention(q, few_lengths, block_table=table, **options)
    assert torch.equal(many, alone.repeat(repeats, 1, 1, 1))


@pytest.mark.parametrize("name", ALL)
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


@pytest.mark.parametrize("name", CODED)
def test_the_host_does_not_wait(name: str) -> None:
    """CHECKLIST 21"""
    cache, lengths = filled(name, [100, 7])
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
