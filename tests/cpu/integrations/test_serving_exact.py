"""CHECKLIST 34: several GPUs give the bits of one, where they are asked to."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from liquidgemm import LiquidConfig, LiquidLinear, QuantizedWeight, quantize_activation
from liquidgemm.integrations.serving import exact
from liquidgemm.integrations.serving.layout import Packed, Slice, pack
from liquidgemm.quantization.layer import quantize_layer

N = 72
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = {"plain": {}, "augment": {"augment": 64}, "keep": {"keep": ("layer",)}}


def weight(k: int, kind: str) -> QuantizedWeight:
    w = torch.randn(N, k, generator=torch.Generator().manual_seed(1))
    return quantize_layer(w, LiquidConfig(**KINDS[kind]))[0]


def tokens(k: int, dtype: torch.dtype) -> Tensor:
    """Among them rows of zeros and with a NaN, an infinity, an outlier and denormals."""
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(2))
    x[0], x[1, 3], x[2, -1], x[3, k // 2] = 0, torch.nan, -torch.inf, 300
    x[4] *= torch.finfo(dtype).tiny / 8
    x[5, : k // 2] = 0
    return x.to(dtype)


def slice_of(w: QuantizedWeight, rank: int, size: int) -> tuple[Slice, Packed]:
    k = w.in_features
    part = Slice(rank * k // size, k // size, k)
    codes = tuple(part.of_codes(t, w.augment) for t in (w.qweight, w.qscale, w.qoffset))
    columns = torch.empty(0, dtype=torch.int32) if w.columns is None else w.columns
    return part, pack(codes, w.scale, [N], [part.of_columns(columns)], part)


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit; a NaN is a NaN."""
    nan = one.isnan()
    return bool((nan == other.isnan()).all()) and torch.equal(one[~nan], other[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_quantized_as_whole_ones(dtype):
    x = tokens(344, dtype)
    x8, scale = quantize_activation(x)
    own = [exact.row_maxima(part) for part in x.split(43, -1)]
    parts = [exact.quantize(part, torch.stack(own).amax(0)) for part in x.split(43, -1)]
    assert torch.equal(torch.cat([q for q, _ in parts], -1), x8)
    assert all(same(step, scale) for _, step in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "size"), [(512, 2), (344, 2), (360, 5), (344, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_several_gpus_give_the_bits_of_one(kind, k, size, dtype):
    """Also where a slice cuts a group; the others' maxima and sums come from a first round."""
    w, x, bias = weight(k, kind), tokens(k, dtype), torch.randn(N).to(dtype)
    held = [slice_of(w, rank, size) for rank in range(size)]
    sums: list[Tensor] = []

    def give(rank: int, total) -> Tensor:
        part, packed = held[rank]
        own = x[:, part.start : part.start + part.length]
        given = packed.weight, packed.scale, bias, packed.gather, packed.pad
        return exact.row_parallel(own, *given, largest=lambda _: exact.row_maxima(x), total=total)

    for rank in range(size):
        give(rank, lambda own: sums.append(own) or own)
    y = LiquidLinear.from_quantized(w, bias)(x)
    for rank in range(size):
        assert same(give(rank, lambda _: torch.stack(sums).sum(0, dtype=torch.int32)), y)


def as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def reduced(op):
        def reduce(own: Tensor) -> Tensor:
            distributed.all_reduce(own, op=op)
            return own

        return reduce

    k, outputs = 344, []
    for kind in KINDS:
        part, packed = slice_of(weight(k, kind), rank, 2)
        own = tokens(k, torch.bfloat16)[:, part.start : part.start + part.length]
        given = packed.weight, packed.scale, None, packed.gather, packed.pad
        largest, total = reduced(distributed.ReduceOp.MAX), reduced(distributed.ReduceOp.SUM)
        outputs.append(exact.row_parallel(own, *given, largest=largest, total=total))
    torch.save(outputs, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_give_the_bits_of_one(tmp_path: Path):
    multiprocessing.spawn(as_one_of_two, (str(tmp_path),), nprocs=2)
    x = tokens(344, torch.bfloat16)
    whole = [LiquidLinear.from_quantized(weight(344, kind))(x) for kind in KINDS]
    for rank in range(2):
        for y, expected in zip(torch.load(tmp_path / f"{rank}.pt"), whole, strict=True):
            assert same(y, expected)
