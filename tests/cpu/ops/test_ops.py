"""The ops on the CPU: exactness, and inputs of every layout."""

import numpy as np
import pytest
import reference
import torch
from gemm_case import Case
from hypothesis import given
from hypothesis import strategies as st

from liquidgemm import gemm, linear, pack_weight, quantize_activation, unpack_weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.liquidgemm


# quantize_activation.


def special_rows():
    """CHECKLIST 8: every kind of row that has a rule of its own, and ties."""
    torch.manual_seed(0)
    rows = torch.randn(14, 64)
    rows[1] = 0
    rows[2] *= 1e-42  # denormal
    rows[3] = 0
    rows[3, 5] = 1e-45  # the scale underflows to zero
    rows[4, 7] = 1e4 * rows[4].abs().max()
    rows[5, 0] = torch.inf
    rows[6, 63] = -torch.inf
    rows[7, 9] = torch.nan
    rows[8] = torch.nan
    rows[9] = torch.arange(64) + 0.5
    rows[9, 63] = 127  # scale 1: all others are ties
    rows[10] = -rows[9]
    rows[11] = torch.finfo(torch.float32).max
    rows[12, ::2] = torch.nan
    rows[12, 1::2] = torch.inf
    rows[13] = 190 * 2.0**-149  # the scale is rounded down so far that x / scale exceeds 127
    return rows


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activation_special_rows(dtype):
    """CHECKLIST 8."""
    x = special_rows().to(dtype)
    got = quantize_activation(x)
    for part, expected in zip(got, reference.quantize_activation(x), strict=True):
        reference.assert_same(part, expected, dtype=dtype)
    if dtype == torch.float32:
        x8, scale = got
        assert scale[[5, 6, 7, 8, 12]].isnan().all()
        assert scale[9] == 1
        assert x8[9, :4].tolist() == [0, 2, 2, 4]
        assert (x8[[1, 3, 5, 6, 7, 8, 12]] == 0).all()
        assert (x8[13] == 127).all()
        assert x8[2].abs().max() >= 100


@pytest.mark.parametrize("k", [1, 64, 100, 576, 4096, 65536])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activation(k, dtype):
    """CHECKLIST 8: hidden sizes."""
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    for got, expected in zip(quantize_activation(x), reference.quantize_activation(x), strict=True):
        reference.assert_same(got, expected, k=k, dtype=dtype)


def test_quantize_activation_divides_as_ieee():
    """CHECKLIST 8: every bfloat16 as a row of its own; a product with 1/127 would differ."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).unsqueeze(1)
    for got, expected in zip(quantize_activation(x), reference.quantize_activation(x), strict=True):
        reference.assert_same(got, expected)


# gemm.


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (1, 64, 64),
        (3, 8, 130),
        (5, 72, 576),
        (17, 130, 896),
        (4, 136, 1376),
        (64, 192, 2880),
        (0, 64, 64),
        (2, 65, 5472),
    ],
)
def test_gemm_is_exact(m, n, k):
    """The INT32 result and, from it, every float output to the bit."""
    case = Case(m, n, k)
    reference.assert_same(case.gemm(out_dtype=torch.int32), case.acc.int(), m=m, n=n, k=k)
    for dtype in FLOATS:
        for bias in (None, *(case.bias.to(d) for d in FLOATS)):
            expected = reference.epilogue(case.acc, case.x_scale, case.weight_scale, bias, dtype)
            bias_dtype = None if bias is None else bias.dtype
            got = case.gemm(bias, dtype)
            reference.assert_same(got, expected, m=m, n=n, k=k, dtype=dtype, bias=bias_dtype)
    assert case.gemm().dtype == torch.bfloat16


@given(st.integers(0, 70), st.integers(1, 150), st.integers(1, 700), st.integers(0, 2**31))
def test_gemm_fuzz(m, n, k, seed):
    """CHECKLIST 17."""
    case = Case(m, n, k, seed)
    reference.assert_same(case.gemm(out_dtype=torch.int32), case.acc.int(), m=m, n=n, k=k)
    expected = reference.epilogue(
        case.acc, case.x_scale, case.weight_scale, case.bias, torch.float16
    )
    reference.assert_same(case.gemm(case.bias, torch.float16), expected, m=m, n=n, k=k)


@pytest.mark.parametrize("low", [False, True])
def test_gemm_at_the_ends_of_the_range(low):
    """CHECKLIST 3 on the CPU: the largest sums there are, at the largest K, which is no multiple
    of 64: the weight is padded beyond it."""
    k, groups = 132104, 2065
    value = -128 if low else 127
    qweight = torch.full((2, groups * 32), 0 if low else 0xFF, dtype=torch.uint8)
    qscale = torch.full((2, groups), 17, dtype=torch.uint8)
    qoffset = torch.zeros(2, groups, dtype=torch.uint8)
    packed = pack_weight(qweight, qscale, qoffset)
    for back, original in zip(unpack_weight(packed, 2), (qweight, qscale, qoffset), strict=True):
        reference.assert_same(back, original)
    x = torch.full((2, k), 127, dtype=torch.int8)
    x[1] = -127
    got = gemm(x, torch.ones(2), packed, torch.ones(2), out_dtype=torch.int32)
    assert got.tolist() == [[127 * value * k] * 2, [-127 * value * k] * 2]


def test_accumulator_is_rounded_once():
    """Sums past 2^24 become the nearest float32, ties to even."""
    case = Case(64, 64, 8192)
    qweight, qscale, _ = case.logical
    qoffset = torch.randint(200, 256, qscale.shape).to(torch.uint8)
    logical = qweight, torch.zeros_like(qscale), qoffset
    x = case.x.clamp(min=100)
    acc = reference.product(x, reference.decode(*logical))
    assert (acc.abs() > 2**24).all()
    assert (acc.float().long() != acc).any()
    ones = {"x_scale": torch.ones(64), "weight_scale": torch.ones(64)}
    got = case.gemm(x=x, weight=pack_weight(*logical), out_dtype=torch.float32, **ones)
    reference.assert_same(got, acc.float())


@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, -0.0] * 36)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_scales(dtype, bias):
    """CHECKLIST 1: zeros of both signs, denormals, overflow and NaN, by the same formula."""
    special = [1.0, 0.0, -0.0, -0.75, 1e-30, 1e-40, -1e-44, 3e38, torch.inf]
    case = Case(9, 72, 200)
    scales = {"x_scale": torch.tensor(special), "weight_scale": torch.tensor(special).repeat(8)}
    with np.errstate(all="ignore"):
        expected = reference.epilogue(case.acc, *scales.values(), bias, dtype)
    reference.assert_same(case.gemm(bias, dtype, **scales), expected)


def test_padding_columns_of_the_weight_are_ignored():
    """Whatever the last group holds past K."""
    case = Case(3, 64, 100)
    other = case.logical[0].clone()
    other[:, 50:] ^= 0xFF
    other = pack_weight(other, torch.ones_like(case.logical[1]), torch.zeros_like(case.logical[2]))
    same = case.logical[0].clone()
    same = pack_weight(same, torch.ones_like(case.logical[1]), torch.zeros_like(case.logical[2]))
    raw = torch.int32
    reference.assert_same(
        case.gemm(weight=other, out_dtype=raw), case.gemm(weight=same, out_dtype=raw)
    )


def test_batch_invariance():
    """A row alone equals the same row in any batch, at any position."""
    case = Case(40, 136, 576)
    whole = case.gemm(case.bias)
    for start, stop in ((0, 1), (7, 8), (39, 40), (3, 20)):
        part = case.gemm(case.bias, x=case.x[start:stop], x_scale=case.x_scale[start:stop])
        reference.assert_same(part, whole[start:stop], rows=(start, stop))


def test_a_nan_row_stays_alone():
    """CHECKLIST 8: NaN and inf give NaN in their own rows only."""
    case = Case(1, 70, 64)
    x = special_rows()
    y = linear(x, case.weight, case.weight_scale, case.bias)
    bad = [5, 6, 7, 8, 12]
    assert y[bad].isnan().all()
    good = [i for i in range(len(x)) if i not in bad]
    assert not y[good].isnan().any()
    reference.assert_same(y[good], linear(x[good], case.weight, case.weight_scale, case.bias))


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_is_quantize_and_gemm(dtype):
    case = Case(1, 136, 200)
    x = torch.randn(2, 3, 200).to(dtype)
    x8, scale = quantize_activation(x)
    expected = gemm(x8, scale, case.weight, case.weight_scale, case.bias, dtype)
    reference.assert_same(linear(x, case.weight, case.weight_scale, case.bias), expected)


def test_exact_whatever_the_matmul_precision():
    case = Case(8, 64, 4096)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        reference.assert_same(case.gemm(out_dtype=torch.int32), case.acc.int())
    finally:
        torch.set_float32_matmul_precision(before)


# Inputs of every layout.


def layouts(t):
    """The same values as transposed, strided, offset, odd-offset and inference tensors."""
    yield "transposed", t.T.contiguous().T if t.dim() == 2 else t
    yield "strided", t.repeat_interleave(3, -1)[..., ::3]
    yield "rows apart", torch.stack((t, t), -2).flatten(0, -2)[::2] if t.dim() == 2 else t
    offset = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    yield "odd offset", offset.copy_(t)
    with torch.inference_mode():
        yield "inference", t.clone()


def test_layouts_of_gemm():
    """CHECKLIST 7."""
    case = Case(6, 72, 200)
    expected = case.gemm(case.bias)
    for name in ("x", "x_scale", "weight_scale"):
        for layout, tensor in layouts(getattr(case, name)):
            reference.assert_same(case.gemm(case.bias, **{name: tensor}), expected, layout=layout)
    for layout, bias in layouts(case.bias):
        reference.assert_same(case.gemm(bias), expected, layout=layout)
    spread = case.weight.repeat_interleave(2, -1)[..., ::2]
    reference.assert_same(case.gemm(case.bias, weight=spread), expected)
    frozen = case.gemm(case.bias, x_scale=case.x_scale.clone().requires_grad_())
    reference.assert_same(frozen.detach(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_of_quantize_activation_and_linear(dtype):
    """CHECKLIST 7."""
    case = Case(1, 72, 200)
    x = torch.randn(6, 200).to(dtype)
    expected = quantize_activation(x)
    y = linear(x, case.weight, case.weight_scale)
    for layout, variant in (*layouts(x), ("requires_grad", x.clone().requires_grad_())):
        for got, want in zip(quantize_activation(variant), expected, strict=True):
            reference.assert_same(got.detach(), want, layout=layout)
            assert got.is_contiguous()
        got = linear(variant, case.weight, case.weight_scale)
        reference.assert_same(got.detach(), y, layout=layout)
        assert got.is_contiguous()


def test_batch_dimensions():
    """CHECKLIST 7: 1-D, leading dimensions, stride 0 and no rows."""
    case = Case(24, 72, 200)
    flat = case.gemm(case.bias)
    x, scale = case.x.view(2, 3, 4, 200), case.x_scale.view(2, 3, 4)
    got = case.gemm(case.bias, x=x, x_scale=scale)
    reference.assert_same(got, flat.view(2, 3, 4, 72))
    permuted = case.gemm(case.bias, x=x.transpose(0, 2), x_scale=scale.transpose(0, 2))
    reference.assert_same(permuted, got.transpose(0, 2))
    assert permuted.is_contiguous()
    reference.assert_same(case.gemm(case.bias, x=case.x[5], x_scale=case.x_scale[5]), flat[5])
    expanded = case.gemm(case.bias, x=case.x[:1].expand(4, 200), x_scale=case.x_scale[:1].expand(4))
    reference.assert_same(expanded, flat[:1].expand(4, 72))
    for shape in ((0, 200), (3, 0, 200)):
        empty = torch.empty(shape)
        assert linear(empty, case.weight, case.weight_scale).shape == (*shape[:-1], 72)
        x8, scale = quantize_activation(empty)
        assert (x8.shape, scale.shape) == (shape, shape[:-1])
    one = linear(torch.ones(200), case.weight, case.weight_scale)
    reference.assert_same(one, linear(torch.ones(1, 200), case.weight, case.weight_scale)[0])
