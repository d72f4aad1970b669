"""Layers as serving engines have them, fused and sliced, with residual columns: exact sums."""

import pytest
import torch
from torch import Tensor

from liquidgemm import LiquidConfig, LiquidLinear, QuantizedWeight, gemm, quantize_activation
from liquidgemm.formats import int8, liquidquant6
from liquidgemm.formats.liquidquant import BLOCK_BYTES_G32, GROUP, padded
from liquidgemm.integrations.serving.layout import Packed, Slice, as_packed, pack
from liquidgemm.integrations.serving.names import Names
from liquidgemm.integrations.serving.tensors import checked, one_or_each, shape_of
from liquidgemm.quantization.layer import quantize_layer
from liquidgemm.weights.weight import Form

KEEP, SIX = -1, -2  # of residual columns: all, in their order, of weights of 8 and 6 bits
FINE = 10_000  # added to them: groups of 32


def weight(n: int, k: int, augment: int, seed: int) -> QuantizedWeight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    bits = {"layer": {KEEP: 8, SIX: 6}.get(augment, 4)}
    fine, augment = augment >= FINE, max(augment, 0) % FINE
    config = LiquidConfig(augment=augment, bits=bits, group_size=32 if fine else GROUP)
    return quantize_layer(w, config)[0]


def codes_of(weights: list[QuantizedWeight]) -> tuple[Tensor, ...]:
    """Rows of all, those of the narrower ones filled up, as a loader leaves them."""
    result = []
    for name in ("qweight", "qscale", "qoffset"):
        tensors = [getattr(weight, name) for weight in weights]
        width = max(tensor.shape[1] for tensor in tensors)
        padding = [(0, width - tensor.shape[1]) for tensor in tensors]
        wide = zip(tensors, padding, strict=True)
        result.append(torch.cat([torch.nn.functional.pad(t, p, value=255) for t, p in wide]))
    return tuple(result)


def columns_of(weight: QuantizedWeight, part: Slice) -> Tensor:
    columns = torch.empty(0, dtype=torch.int32) if weight.columns is None else weight.columns
    return part.of_columns(columns)


def sums(packed: Packed, x8: Tensor) -> Tensor:
    x8 = as_packed(x8, packed.gather, packed.pad)
    one = torch.ones(x8.shape[:-1])
    return gemm(x8, one, packed.weight, packed.scale, out_dtype=torch.int32)


def whole_sums(weights: list[QuantizedWeight], x8: Tensor) -> Tensor:
    """By `LiquidLinear`, one layer at a time: x8 has 127 in each row, so that it stays as it is."""
    unit = [
        QuantizedWeight(w.qweight, w.qscale, w.qoffset, torch.ones(len(w.scale)), *tail(w))
        for w in weights
    ]
    layers = [LiquidLinear.from_quantized(w) for w in unit]
    return torch.cat([layer(x8.float()) for layer in layers], -1).int()


def tail(w: QuantizedWeight) -> tuple:
    return w.in_features, w.columns


def tokens(k: int, parts: int = 1) -> Tensor:
    x8 = torch.randint(-127, 128, (5, k), generator=torch.Generator().manual_seed(7)).char()
    x8[:, :: k // parts] = 127
    return x8


@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize(
    "augments",
    [
        *[(0, 0, 0), (64, 64, 64), (64, 0, 128), (KEEP, KEEP, KEEP), (KEEP, 64, 0), (128,)],
        *[(KEEP,), (SIX,), (SIX, SIX, SIX), (KEEP, SIX, 0)],
        *[(FINE,), (FINE, FINE, FINE), (FINE + 64, FINE, FINE + 128), (FINE + 64,)],
    ],
)
def test_fused_layers(augments, k):
    weights = [weight(40 + 8 * i, k, augment, i) for i, augment in enumerate(augments)]
    part = Slice(0, k, k)
    scale = torch.cat([w.scale for w in weights])
    rows = [w.out_features for w in weights]
    packed = pack(codes_of(weights), scale, rows, [columns_of(w, part) for w in weights], part)
    x8 = tokens(k)
    assert torch.equal(quantize_activation(x8.float())[0], x8)
    assert torch.equal(sums(packed, x8), whole_sums(weights, x8))


def test_a_list_that_is_shared_is_gathered_once():
    w, part = weight(64, 256, 64, 0), Slice(0, 256, 256)
    packed = pack(codes_of([w, w]), w.scale.repeat(2), [64, 64], [w.columns, w.columns], part)
    assert packed.weight.shape[1] == (256 + 64) // GROUP
    assert len(packed.gather) == 64
    other = weight(64, 256, 64, 1)
    packed = pack(
        codes_of([w, other]), w.scale.repeat(2), [64, 64], [w.columns, other.columns], part
    )
    assert packed.weight.shape[1] == (256 + 2 * 64) // GROUP


@pytest.mark.parametrize(("k", "parts"), [(512, 2), (512, 4), (448, 2), (360, 5), (344, 8)])
@pytest.mark.parametrize("augment", [0, 64, KEEP, SIX, FINE, FINE + 64])
def test_row_parallel_slices_add_up(augment, k, parts):
    """CHECKLIST 34: with one scale per token the INT32 sums of the slices are those of the whole,
    also where a slice cuts a group."""
    w = weight(72, k, augment, 3)
    x8 = tokens(k, parts)
    total = 0
    for rank in range(parts):
        part = Slice(rank * k // parts, k // parts, k)
        codes = tuple(part.of_codes(t, w.augment) for t in (w.qweight, w.qscale, w.qoffset))
        columns = columns_of(w, part)
        packed = pack(codes, w.scale, [72], [columns], part)
        assert (packed.weight.shape[-1] == BLOCK_BYTES_G32) == (augment >= FINE)
        whole_groups = not part.lead and (part.length % GROUP == 0 or rank == parts - 1)
        whole = augment in (KEEP, SIX) and whole_groups  # and takes half of the columns
        assert int8.is_packed(packed.weight) == (whole and augment == KEEP)
        assert liquidquant6.is_packed(packed.weight) == (whole and augment == SIX)
        width = part.held if whole else part.width(w.augment)
        assert packed.weight.shape[1] * GROUP == width
        own = x8[:, part.start : part.start + part.length]
        assert torch.equal(quantize_activation(own.float())[0], own)
        total = total + sums(packed, own)
    assert torch.equal(total, whole_sums([w], x8))
    if augment in (0, FINE) and not part.lead and k % GROUP == 0:  # those of `narrow_columns`
        narrow = w.narrow_columns(part.start, part.length)
        assert torch.equal(codes[0], narrow.qweight)
        assert torch.equal(codes[1], narrow.qscale)
        assert torch.equal(codes[2], narrow.qoffset)


def test_what_cannot_be_is_refused():
    part = Slice(0, 64, 128)
    with pytest.raises(ValueError, match=r"columns: expected 0 to 127"):
        part.of_columns(torch.tensor([-1, 5], dtype=torch.int32))
    w, part = weight(8, 64, 0, 0), Slice(0, 64, 64)
    with pytest.raises(ValueError, match="scale: expected finite"):
        pack(codes_of([w]), w.scale * torch.nan, [8], [], part)
    missing = tuple(torch.full_like(t, 255) for t in codes_of([w]))
    with pytest.raises(RuntimeError, match="infeasible"):
        pack(missing, w.scale, [8], [torch.empty(0)], part)


def test_what_is_stored_decides_the_shapes():
    """The parameters of a fused layer: as wide as its widest part, and of one kind of groups."""
    part, fine = Slice(0, 200, 200), Form(64, 32)
    assert shape_of(8, "qweight", part, (Form(), Form(64))) == (8, 160)
    assert shape_of(8, "qscale", part, (Form(), Form(64))) == (8, 5)
    assert shape_of(8, "qscale", part, (fine, Form(0, 32))) == (8, 10)
    assert checked(torch.zeros(8, 10, dtype=torch.uint8), "qscale", part, (fine,)).shape[1] == 10
    with pytest.raises(ValueError, match=r"qoffset: expected uint8 with rows of 10, got .*5"):
        checked(torch.zeros(8, 5, dtype=torch.uint8), "qoffset", part, (fine,))
    assert one_or_each(("q", "k"), (Form(0, 32), Form(0, 32)), (8, 8)) == (Form(0, 32),)
    message = "q: expected the same groups in layers that are fused, got groups of 32 and 64 in"
    with pytest.raises(ValueError, match=message):
        one_or_each(("q", "k"), (Form(0, 32), Form(256)), (8, 8))


def test_padding():
    assert Slice(0, 200, 200).width(64) == padded(200) + 64


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_names():
    layers = {f"model.layers.0.a.{part}": i for i, part in enumerate(FUSED["qkv_proj"])}
    names = Names({**layers, "model.layers.0.m.gate_up_proj": 7, "model.layers.1.m.up_proj": 1})
    assert names.of("model.layers.0.a.qkv_proj", FUSED) == layers
    assert list(names.of("layers.0.a.qkv_proj", FUSED).values()) == [0, 1, 2]
    assert names.of("model.layers.0.m.gate_up_proj", FUSED) == {"model.layers.0.m.gate_up_proj": 7}
    assert names.of("model.layers.0.m.down_proj", FUSED) == {}
    with pytest.raises(ValueError, match=r"got model\.layers\.1\.m\.gate_proj in floats"):
        names.of("model.layers.1.m.gate_up_proj", FUSED)
