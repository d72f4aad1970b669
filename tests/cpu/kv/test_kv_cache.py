"""KVCache and its ops on a CPU."""

import dataclasses

import pytest
import torch
from kv_problems import dense_attention, paged_copy, poison_, rows, same_bits

from liquidgemm.kv import KVCache
from liquidgemm.kv.format import FORMATS, dequantize, quantize

LENGTHS = [70, 1, 37]
HEADS, D = 2, 64


def filled(name: str, heads: int = HEADS, tokens: int = 96, head_dim: int = D):
    """A poisoned cache with three sequences written to it, their keys and values, and lengths."""
    cache = poison_(KVCache.allocate(name, len(LENGTHS), heads, tokens, head_dim))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    k, v = (rows(len(LENGTHS), max(LENGTHS), heads, head_dim, seed=seed) for seed in (1, 2))
    cache.write_(k, v, lengths)
    return cache, k, v, lengths


@pytest.fixture(scope="module", params=list(FORMATS))
def case(request):
    return filled(request.param)


def test_write_and_read(case) -> None:
    """What is read is what was quantized, of these tokens, and nothing else was written."""
    cache, k, v, lengths = case
    for values, (x, read) in enumerate(zip((k, v), cache.read(), strict=True)):
        codes, params = quantize(x, cache.format, bool(values))
        expected = dequantize(codes, params, cache.format, bool(values)).transpose(1, 2)
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(read[b, :, :length], expected[b, :, -length:])
    for tensor in cache.tensors:
        if tensor is not None and tensor.dim() == 3:  # parameters are NaN where poisoned
            assert (tensor[1, :, 1:].view(torch.uint8) == 0xFF).all()


def test_one_token_at_a_time_is_the_same(case) -> None:
    """CHECKLIST 9: the codes of a token do not depend on the call."""
    cache, k, v, lengths = case
    other = poison_(KVCache.allocate(cache.format.name, *cache.k.shape[:3], D))
    longest = max(LENGTHS)
    for i in range(longest):
        other.write_(k[:, i : i + 1], v[:, i : i + 1], lengths - (longest - 1 - i))
    assert same_bits(cache, other)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("rows_of_center", [1, 3])
def test_a_center_is_not_seen(name: str, rows_of_center: int) -> None:
    """Keys far from zero are as good as those around it, and scores move by a constant."""
    cache, k, v, lengths = filled(name)
    center = 50 * rows(rows_of_center, HEADS, D, seed=13, dtype=torch.float32)
    far = (k.float() + center[:, None]).float()
    centered = dataclasses.replace(
        KVCache.allocate(name, len(LENGTHS), HEADS, 96, D), k_center=center
    )
    centered.write_(far, v.float(), lengths)
    q = rows(len(LENGTHS), 1, 2 * HEADS, D, seed=14)
    expected = cache.attention(q, lengths, 0.1).float()
    found = centered.attention(q, lengths, 0.1).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    read = centered.read()[0][0, :, : LENGTHS[0]]
    assert (read - far[0, -LENGTHS[0] :].transpose(0, 1)).abs().max() < 1
    with pytest.raises(ValueError, match="softcap: expected 0"):
        centered.attention(q, lengths, softcap=1.0)


def test_tokens_beyond_the_capacity_are_not_written() -> None:
    cache = poison_(KVCache.allocate("int8", 1, 1, 16, 64))
    x = rows(1, 3, 1, 64, seed=3)
    cache.write_(x, x, torch.tensor([18], dtype=torch.int32))  # tokens 15, 16 and 17
    assert cache.k_params[0, 0, :15].isnan().all()
    assert not cache.k_params[0, 0, 15].isnan()


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"starts": [4, 0, 36]}])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention(case, options: dict, queries: int) -> None:
    cache, _, _, lengths = case
    q = rows(len(LENGTHS), queries, 2 * HEADS, D, seed=4, dtype=torch.float32)
    k, v = cache.read()
    expected = dense_attention(q, k, v, LENGTHS, 0.2, **options)
    tensors = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in options.items()
    }
    out = cache.attention(q, lengths, 0.2, **tensors)
    # INT8 steps of the queries change scores by about 1 %.
    tolerance = 0.02 if cache.format.params is not None else 1e-5
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("page_tokens", [16, 32, 48])
def test_pages_change_nothing(case, page_tokens: int) -> None:
    cache, _, _, lengths = case
    paged, table = paged_copy(cache, page_tokens, seed=5)
    q = rows(len(LENGTHS), 1, 2 * HEADS, D, seed=6)
    expected = cache.attention(q, lengths)
    assert torch.equal(paged.attention(q, lengths, block_table=table), expected)
    x = rows(len(LENGTHS), 1, HEADS, D, seed=7)
    longer = lengths + 1
    paged.write_(x, x, longer, table)
    cache.write_(x, x, longer)
    assert torch.equal(paged.attention(q, longer, block_table=table), cache.attention(q, longer))


def test_a_sequence_that_sees_nothing_gives_zeros() -> None:
    cache = poison_(KVCache.allocate("int8", 2, 1, 16, 64))
    q = rows(2, 1, 4, 64, seed=8)
    out = cache.attention(q, torch.zeros(2, dtype=torch.int32))
    assert not out.any()


@pytest.mark.parametrize("name", ["int8", "bfloat16"])
def test_opcheck(name: str) -> None:
    """CHECKLIST 18"""
    cache, k, v, lengths = filled(name)
    q = rows(len(LENGTHS), 1, 4, D, seed=9)
    ops = torch.ops.liquidgemm
    torch.library.opcheck(ops.kv_write_.default, (k, v, *cache.tensors, lengths))
    torch.library.opcheck(ops.kv_attention.default, (q, *cache.tensors, lengths, 0.1))


def test_compiled_in_one_graph() -> None:
    """CHECKLIST 18: a step that writes and attends, without a copy of the cache."""
    cache, _, _, lengths = filled("int8")
    other, _, _, _ = filled("int8")
    x, q = rows(3, 1, HEADS, D, seed=10), rows(3, 1, 4, D, seed=11)

    def step(cache: KVCache, lengths: torch.Tensor) -> torch.Tensor:
        lengths = lengths + 1
        cache.write_(x, x, lengths)
        return cache.attention(q, lengths)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cache, lengths), step(other, lengths))
    assert torch.equal(cache.k, other.k)


def changed(**changes):
    """Arguments of `kv_attention` with some changed."""
    cache = KVCache.allocate("int8", 2, 2, 16, 64)
    arguments = {
        "q": torch.zeros(2, 1, 4, 64),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k_params": cache.k_params,
        "v_params": cache.v_params,
        "lengths": torch.zeros(2, dtype=torch.int32),
        "scale": 1.0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 1, 3, 64)}, "q: expected a multiple of 2 heads, got 3 heads"),
        ({"q": torch.zeros(2, 1, 4, 128)}, "q: expected shape .* got"),
        ({"q": torch.zeros(2, 33, 4, 64)}, "q: expected at most 64 tokens x heads"),
        ({"q": torch.zeros(2, 1, 4, 64).int()}, "q: expected dtype"),
        ({"v_cache": torch.zeros(2, 2, 16, 64).char()}, "v_cache: expected shape"),
        ({"k_params": None}, "k_params: expected a tensor for int8, got None"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths: expected dtype int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths: expected one for each of 2"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table: expected shape"),
        ({"starts": torch.zeros(3, dtype=torch.int32)}, "starts: expected shape"),
        ({"window": -1}, "window: expected 0"),
        ({"softcap": -1.0}, "softcap: expected 0"),
        ({"k_cache": torch.zeros(2, 2, 16, 48).char()}, "k_cache: expected a head_dim of"),
    ],
)
def test_misuse(changes: dict, message: str) -> None:
    """CHECKLIST 7"""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.liquidgemm.kv_attention(**changed(**changes))


def test_no_derivative() -> None:
    cache, _, _, lengths = filled("int8")
    q = rows(3, 1, 4, D, seed=12).requires_grad_()
    with pytest.raises(RuntimeError, match="kv_attention is not differentiable"):
        cache.attention(q, lengths).sum().backward()


@pytest.mark.parametrize(("name", "head_dim"), [("int3", 64), ("int8", 80)])
def test_allocate_refuses(name: str, head_dim: int) -> None:
    with pytest.raises(ValueError, match=r"(format|head_dim): expected"):
        KVCache.allocate(name, 1, 1, 8, head_dim)
