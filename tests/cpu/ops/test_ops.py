"""The ops on the CPU: exactness, inputs, errors, autograd, torch.compile and export."""

import numpy as np
import pytest
import reference
import torch
from fresh_process import run_python
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import liquidgemm
from liquidgemm import gemm, linear, pack_weight, quantize_activation, unpack_weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.liquidgemm


class Case:
    """Random inputs of a gemm with their integer reference."""

    def __init__(self, m, n, k, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logical = reference.random_logical(n, k, seed)
        self.weight = pack_weight(*self.logical)
        self.weight_scale = torch.rand(n, generator=generator) * 1e-3
        self.x = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
        self.x_scale = torch.rand(m, generator=generator) * 1e-2
        self.bias = torch.randn(n, generator=generator)
        self.acc = reference.product(self.x, reference.decode(*self.logical))

    def gemm(self, bias=None, out_dtype=None, **changes):
        names = ("x", "x_scale", "weight", "weight_scale")
        return gemm(*(changes.get(n, getattr(self, n)) for n in names), bias, out_dtype)


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


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 100)}, "x: expected dtype int8, got float32"),
        ({"x": torch.tensor(1).to(torch.int8)}, r"x: expected at least 1 dimension, got .*\[\]"),
        ({"x": torch.zeros(2, 0).to(torch.int8)}, r"x: expected at least 1 column, .*\[2, 0\]"),
        ({"x": torch.zeros(2, 129).to(torch.int8)}, r"weight: expected shape \[2, 3, 2176\]"),
        ({"x": torch.zeros(2, 64).to(torch.int8)}, r"weight: .*K = 64 of x, got \[2, 2, 2176\]"),
        ({"x_scale": torch.ones(2).double()}, "x_scale: expected dtype float32, got float64"),
        ({"x_scale": torch.ones(3)}, r"x_scale: expected shape \[2\], got \[3\]"),
        ({"x_scale": torch.ones(2, 1)}, r"x_scale: expected shape \[2\], got \[2, 1\]"),
        ({"x_scale": torch.ones(2, device="meta")}, "x_scale: expected on .* like x, got on"),
        ({"weight": torch.zeros(2, 2, 2176)}, "weight: expected dtype uint8, got float32"),
        ({"weight": torch.zeros(2, 2, 99).byte()}, r"weight: expected shape .*\[2, 2, 99\]"),
        ({"weight": torch.zeros(2, 2).byte()}, r"weight: expected shape .*got \[2, 2\]"),
        ({"weight": torch.zeros(2, 2, 2176, device="meta").byte()}, "weight: expected on"),
        ({"weight_scale": torch.ones(70).half()}, "weight_scale: expected dtype float32"),
        ({"weight_scale": torch.ones(70, 1)}, r"weight_scale: expected shape \[N\], got \[70, 1\]"),
        ({"weight_scale": torch.ones(0)}, r"weight_scale: expected shape \[N\], got \[0\]"),
        ({"weight_scale": torch.ones(129)}, r"weight: .*\[3, 2, 2176\] for N = 129 of weight_sc"),
        ({"weight_scale": torch.ones(70, device="meta")}, "weight_scale: expected on"),
        ({"bias": torch.ones(71)}, r"bias: expected shape \[70\], got \[71\]"),
        ({"bias": torch.ones(70).int()}, "bias: expected dtype float32 or bfloat16 or float16"),
        ({"bias": torch.ones(70, device="meta")}, "bias: expected on"),
        ({"out_dtype": torch.int8}, "out_dtype: expected bfloat16 or .* or int32, got int8"),
        ({"out_dtype": torch.int32, "bias": torch.ones(70)}, "bias: expected None .*int32"),
    ],
)
def test_errors_of_gemm(changes, message):
    """CHECKLIST 7: the message names the argument, what was expected and what came."""
    arguments = {
        "x": torch.zeros(2, 100, dtype=torch.int8),
        "x_scale": torch.ones(2),
        "weight": torch.zeros(2, 2, 2176, dtype=torch.uint8),
        "weight_scale": torch.ones(70),
    }
    gemm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        gemm(**(arguments | changes))


@pytest.mark.parametrize("op", ["gemm", "linear"])
def test_k_is_limited_by_the_accumulator(op):
    """CHECKLIST 7: K past 132 104 could overflow 32 bits."""
    weight = torch.zeros(1, 2065, 2176, dtype=torch.uint8)
    for k in (132105, 132160):
        x = torch.zeros(1, k)
        arguments = (x,) if op == "linear" else (x.to(torch.int8), torch.ones(1))
        with pytest.raises(RuntimeError, match=f"x: expected K <= 132104 .*got K = {k}"):
            getattr(OPS, op)(*arguments, weight, torch.ones(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 100).double()}, "x: expected dtype .*float16, got float64"),
        ({"x": torch.zeros(2, 100).int()}, "x: expected dtype .*got int32"),
        ({"x": torch.zeros(2, 300)}, r"weight: expected shape \[2, 5, 2176\]"),
        ({"bias": torch.zeros(1)}, r"bias: expected shape \[70\], got \[1\]"),
    ],
)
def test_errors_of_linear(changes, message):
    """CHECKLIST 7."""
    arguments = {
        "x": torch.zeros(2, 100),
        "weight": torch.zeros(2, 2, 2176, dtype=torch.uint8),
        "weight_scale": torch.ones(70),
    }
    linear(**arguments)
    with pytest.raises(RuntimeError, match=message):
        linear(**(arguments | changes))


def test_ops_know_k_by_its_groups():
    """CHECKLIST 24: as documented: up to 63 columns less than the padded K, the first ones."""
    case = Case(3, 72, 128)
    for k in (65, 66, 127, 128):
        x = torch.randn(3, k)
        padded_x = torch.nn.functional.pad(x, (0, 128 - k))
        expected = linear(padded_x, case.weight, case.weight_scale)
        got = linear(x, case.weight, case.weight_scale)
        reference.assert_same(got, expected, k=k)
    for k in (1, 64, 129, 192):
        with pytest.raises(RuntimeError, match=f"weight: expected shape .*K = {k} of x"):
            linear(torch.randn(3, k), case.weight, case.weight_scale)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((), torch.float32, "x: expected at least 1 dimension"),
        ((4, 0), torch.float32, "x: expected at least 1 column"),
        ((4, 4), torch.float64, "x: expected dtype .*got float64"),
        ((4, 4), torch.int8, "x: expected dtype .*got int8"),
    ],
)
def test_errors_of_quantize_activation(shape, dtype, message):
    """CHECKLIST 7."""
    with pytest.raises(RuntimeError, match=message):
        quantize_activation(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(70, 64).int(), "qweight: expected dtype"),
        (0, torch.zeros(70).byte(), "qweight: expected"),
        (0, torch.zeros(70, 48).byte(), r"qweight: expected .*multiple of 64, got .*\[70, 48\]"),
        (0, torch.zeros(70, 0).byte(), r"qweight: expected .*got .*\[70, 0\]"),
        (0, torch.zeros(1, 66080 + 32).byte(), "qweight: expected K <= 132160 .*got K = 132224"),
        (1, torch.zeros(70, 2), "qscale: expected dtype"),
        (1, torch.zeros(70, 3).byte(), r"qscale: expected shape \[70, 2\], got \[70, 3\]"),
        (2, torch.zeros(70, 2).char(), "qoffset: expected dtype"),
        (2, torch.zeros(71, 2).byte(), r"qoffset: expected shape \[70, 2\], got \[71, 2\]"),
    ],
)
def test_errors_of_pack_weight(index, wrong, message, device):
    """CHECKLIST 7, by the compiled packer and by the shape function alike."""
    tensors = [torch.zeros(70, 64), torch.zeros(70, 2), torch.zeros(70, 2)]
    tensors = [t.byte().to(device) for t in tensors]
    pack_weight(*tensors)
    tensors[index] = wrong.to(device)
    with pytest.raises(RuntimeError, match=message):
        pack_weight(*tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("packed", "n", "message"),
    [
        (torch.zeros(2, 1, 2176), 70, "packed: expected dtype"),
        (torch.zeros(2, 2176).byte(), 70, "packed: expected"),
        (torch.zeros(2, 1, 2175).byte(), 70, r"packed: expected .*got .*\[2, 1, 2175\]"),
        (torch.zeros(1, 2066, 2176).byte(), 1, "packed: expected K <= 132160 .*got K = 132224"),
        (torch.zeros(2, 1, 2176).byte(), 64, "n: expected 65 to 128 .*got 64"),
        (torch.zeros(2, 1, 2176).byte(), 129, "n: expected 65 to 128 .*got 129"),
        (torch.zeros(2, 1, 2176).byte(), -1, "n: expected 65 to 128 .*got -1"),
    ],
)
def test_errors_of_unpack_weight(packed, n, message, device):
    """CHECKLIST 7, by the compiled packer and by the shape function alike."""
    with pytest.raises(RuntimeError, match=message):
        unpack_weight(packed.to(device), n)


# Autograd.


@pytest.mark.parametrize("shape", [(200,), (5, 200), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient(shape, dtype):
    """Straight through to x with the dequantized weight, and to the bias as a plain sum."""
    case = Case(1, 72, 200)
    x = torch.randn(shape).to(dtype).requires_grad_()
    bias = case.bias.clone().requires_grad_()
    y = linear(x, case.weight, case.weight_scale, bias)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    w8 = reference.decode(*case.logical)[:, :200]
    dequantized = w8.double() * case.weight_scale.double()[:, None]
    exact = grad.double() @ dequantized
    same_precision = (grad @ dequantized.to(dtype)).double()
    error, allowed = (x.grad.double() - exact).norm(), (same_precision - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), (error, allowed)
    assert x.grad.dtype == dtype
    expected = grad.reshape(-1, 72).double().sum(0)
    assert (bias.grad - expected).norm() <= torch.finfo(dtype).eps * 8 * (1 + expected.norm())


def test_no_gradient_to_the_weight_scale():
    """An error: without one, torch.func.grad would take the missing gradient for zero."""
    case = Case(1, 72, 200)
    scale = case.weight_scale.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="linear is differentiable with respect to x and bias"):
        linear(torch.randn(3, 200), case.weight, scale).sum().backward()


def test_integer_ops_say_that_they_are_not_differentiable():
    case = Case(3, 72, 200)
    with pytest.raises(RuntimeError, match=r"gemm is not differentiable.*liquidgemm.linear"):
        case.gemm(x_scale=case.x_scale.clone().requires_grad_()).sum().backward()
    x = torch.randn(3, 200, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"quantize_activation is not differentiable"):
        quantize_activation(x)[1].sum().backward()


# torch.library, torch.compile, torch.export.


def op_samples():
    case = Case(5, 72, 200)
    weight = (case.weight, case.weight_scale)
    quantized = (case.x, case.x_scale, *weight)
    x = torch.randn(2, 3, 200)
    yield "quantize_activation", (x,)
    yield "quantize_activation", (x.bfloat16().transpose(0, 1),)
    yield "pack_weight", case.logical
    yield "unpack_weight", (case.weight, 72)
    yield "gemm", quantized
    yield "gemm", (*quantized, case.bias, torch.float16)
    yield "gemm", (*quantized, None, torch.int32, True)
    yield "linear", (x, *weight)
    yield "linear", (x.half().transpose(0, 1), *weight, case.bias.half())
    yield "linear", (x.clone().requires_grad_(), *weight, case.bias)
    yield "linear", (x[0, 0].clone().requires_grad_(), *weight)
    yield "linear", (x[:, :0], *weight)


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*s, id=s[0]) for s in op_samples()])
def test_opcheck(op, arguments):
    """CHECKLIST 18: schema, fake tensors (strides too), autograd registration, AOT dispatch."""
    torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_every_public_op_is_checked():
    """Nothing else is in the shipped namespace; the others' samples are in tests of their own."""
    names = {
        schema.name.removeprefix("liquidgemm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("liquidgemm::")
    }
    experts = {
        "grouped_gemm",
        "moe",
        "moe_combine",
        "moe_schedule",
        "quantize_activation_rows",
    }
    producers = {"glu_quantize", "rms_norm_quantize"}
    assert names == {op for op, _ in op_samples()} | experts | producers


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_once_for_any_number_of_tokens(backend):
    """CHECKLIST 18: fullgraph, dynamic M, no recompilation, same bits."""
    case = Case(1, 72, 200)

    def function(x):
        y = linear(x, case.weight, case.weight_scale, case.bias)
        x8, scale = quantize_activation(y)
        logical = unpack_weight(case.weight, 72)
        raw = gemm(x8[:, :64], scale, pack_weight(*logical)[:, :1], case.weight_scale)
        return torch.relu(y), raw

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        # 2 is also the number of panels, and sizes that agree in the first call are one symbol.
        for m in (3, 2, 17, 64, 257):
            x = torch.randn(m, 200)
            for got, expected in zip(compiled(x), function(x), strict=True):
                reference.assert_same(got, expected, m=m)
    assert counter.frame_count == 1


def test_compiled_backward():
    """CHECKLIST 18."""
    case = Case(1, 72, 200)

    def function(x):
        return linear(x, case.weight, case.weight_scale).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 200)
        plain, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        function(plain).backward()
        compiled(traced).backward()
        reference.assert_same(traced.grad, plain.grad, m=m)


LOAD_EXPORTED = """
import sys, torch, liquidgemm
data = torch.load(sys.argv[2])
if sys.argv[1].endswith(".aoti.pt2"):
    run = torch._inductor.aoti_load_package(sys.argv[1])
else:
    run = torch.export.load(sys.argv[1]).module()
for x, y in data:
    assert torch.equal(run(x), y), x.shape
print("same")
"""


@pytest.mark.parametrize("aot_inductor", [False, True], ids=["export", "aot_inductor"])
def test_export_and_load_in_a_fresh_process(tmp_path, aot_inductor):
    """CHECKLIST 18: with a dynamic number of tokens."""
    layer = liquidgemm.LiquidLinear.from_linear(torch.nn.Linear(200, 72))
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 200),), dynamic_shapes=({0: tokens},))
        if aot_inductor:
            file = str(tmp_path / "model.aoti.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        else:
            file = str(tmp_path / "model.pt2")
            torch.export.save(program, file)
        inputs = [torch.randn(m, 200) for m in (2, 9, 100)]
        torch.save([(x, model(x)) for x in inputs], tmp_path / "data.pt")
    result = run_python(LOAD_EXPORTED, file, tmp_path / "data.pt")
    assert result.stdout.strip() == "same", result.stdout + result.stderr
