"""INT8 weights by the ops of the CPU: every kernel set is exact, packing is lossless, errors."""

import pytest
import reference
import torch
from format_case import FormatCase, check_every_kernel, check_kernel, check_linear
from hypothesis import given, settings
from hypothesis import strategies as st

import liquidgemm
from liquidgemm import gemm, linear, pack_int8_weight, unpack_int8_weight
from liquidgemm.formats import int8

KERNELS = liquidgemm.cpu_kernels()
OPS = torch.ops.liquidgemm
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore():
    yield
    liquidgemm.set_cpu_kernel()


class Case(FormatCase):
    def draw_weight(self, n, groups):
        w8 = self.draw(-128, 127, n, groups * 64).to(torch.int8)
        return pack_int8_weight(w8), w8


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("extreme", [False, True])
def test_every_kernel_is_exact(kernel, extreme):
    """CHECKLIST 29: one and few tokens, whole tiles of them, rows and k that fill no block."""
    check_kernel(Case, kernel, extreme)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 67)),
    st.integers(1, 150),
    st.integers(1, 1000),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_fuzz(m, n, k, seed, extreme):
    """CHECKLIST 17, 29: all sets on each example."""
    check_every_kernel(Case, m, n, k, seed, extreme)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [2, 17])
def test_the_largest_sums(kernel, m):
    """CHECKLIST 3: at the largest K, which is no multiple of 64."""
    liquidgemm.set_cpu_kernel(kernel)
    k = 132104
    w8 = torch.full((2, 2065 * 64), 127, dtype=torch.int8)
    w8[1] = -128
    x = torch.full((m, k), 127, dtype=torch.int8)
    x[1] = -127
    ones = torch.ones(max(m, 2))
    got = gemm(x, ones[:m], pack_int8_weight(w8), ones[:2], out_dtype=torch.int32)
    assert got[:2].tolist() == [[127 * 127 * k, -127 * 128 * k], [-127 * 127 * k, 127 * 128 * k]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_quantizes_as_ever(kernel):
    check_linear(Case, kernel)


def test_packing_is_lossless():
    """CHECKLIST 4: every value at every place of a block; rows past N decode to 0."""
    n, k = 70, 256
    w8 = (torch.arange(k) + 3 * torch.arange(n)[:, None]).to(torch.uint8).view(torch.int8)
    for layout in (w8, w8.T.contiguous().T, w8.repeat_interleave(2, 1)[:, ::2]):
        packed = pack_int8_weight(layout)
        assert packed.shape == (2, 4, int8.BLOCK_BYTES)
        assert packed.is_contiguous()
        reference.assert_same(unpack_int8_weight(packed, n), w8)
        assert (unpack_int8_weight(packed, 128)[n:] == 0).all()
    # The same product as that of the columns stored twice.
    logical = int8.logical_of(w8)
    columns = int8.columns_of(k)
    twice = liquidgemm.pack_weight(*logical)
    x = torch.randint(-127, 128, (5, k)).to(torch.int8)
    ones = torch.ones(n)
    expected = gemm(torch.cat((x, x[:, columns]), 1), ones[:5], twice, ones, out_dtype=torch.int32)
    reference.assert_same(gemm(x, ones[:5], packed, ones, out_dtype=torch.int32), expected)


def test_opcheck():
    """CHECKLIST 18."""
    c = Case(3, 70, 100)
    x = torch.randn(3, 100)
    for op, arguments in (
        ("pack_int8_weight", (c.w8,)),
        ("unpack_int8_weight", (c.weight, 70)),
        ("gemm", (c.x, c.x_scale, c.weight, c.weight_scale)),
        ("linear", (x, c.weight, c.weight_scale, c.bias)),
        ("dequantize_packed", (c.weight, c.weight_scale, 100, torch.bfloat16)),
    ):
        torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_the_derivative_is_that_of_the_weight():
    """CHECKLIST 27: backward and forward."""
    c = Case(1, 70, 100)
    w = c.w8[:, :100].float() * c.weight_scale[:, None]
    reference.assert_same(OPS.dequantize_packed(c.weight, c.weight_scale, 100, torch.float32), w)
    x, tangent = torch.randn(3, 100, requires_grad=True), torch.randn(3, 100)
    y = linear(x, c.weight, c.weight_scale)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference.assert_same(x.grad, grad @ w)
    _, forward = torch.func.jvp(
        lambda x: OPS.linear(x, c.weight, c.weight_scale), (x.detach(),), (tangent,)
    )
    reference.assert_same(forward, tangent @ w.T)


ZERO = torch.zeros


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pack_int8_weight", (ZERO(70, 64),), "qweight: expected dtype int8, got float32"),
        ("pack_int8_weight", (ZERO(64).char(),), r"qweight: expected \[N, K\].*got shape \[64\]"),
        ("pack_int8_weight", (ZERO(2, 100).char(),), "qweight: .*positive multiple of 64"),
        ("pack_int8_weight", (ZERO(2, 0).char(),), "qweight: .*positive multiple of 64"),
        ("pack_int8_weight", (ZERO(0, 64).char(),), r"qweight: .*got shape \[0, 64\]"),
        ("pack_int8_weight", (ZERO(1, 132224).char(),), "qweight: expected K <= 132160"),
        ("unpack_int8_weight", (ZERO(2, 1, 4096), 70), "packed: expected dtype uint8"),
        ("unpack_int8_weight", (ZERO(2, 1, 2176).byte(), 70), "4096.*from pack_int8_weight"),
        ("unpack_weight", (ZERO(2, 1, 4096).byte(), 70), "2176.*from pack_weight"),
        ("unpack_int8_weight", (ZERO(2, 1, 4096).byte(), 64), "n: expected 65 to 128 .*got 64"),
        ("linear", (ZERO(2, 65), ZERO(1, 1, 4096).byte(), ZERO(64)), r"expected .*1, 2, 4096\]"),
        ("linear", (ZERO(2, 64), ZERO(1, 1, 4095).byte(), ZERO(64)), r"expected .*1, 1, 2176\]"),
    ],
)
def test_errors(op, arguments, message, device):
    """CHECKLIST 7, by the compiled ops and by the shape functions alike."""
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*moved)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_refuse_them(device):
    """There are no grouped kernels for them: in words, before anything is computed."""
    weight = ZERO(2, 1, 1, 4096, dtype=torch.uint8, device=device)
    x = ZERO(4, 64, dtype=torch.int8, device=device)
    offsets = ZERO(3, dtype=torch.int32, device=device)
    ones = torch.ones(4, device=device), torch.ones(2, 64, device=device)
    with pytest.raises(RuntimeError, match=r"4-bit weights in groups of 64, .*\[2, 1, 1, 4096\]"):
        OPS.grouped_gemm(x, ones[0], weight, ones[1], offsets, None, None, "none")


def test_plans():
    """What a GPU would run is known without one, and says why other tiles do not run."""
    explained = liquidgemm.explain_plan(16, 4096, 4096, bits=8)
    four = liquidgemm.explain_plan(16, 4096, 4096)
    reasons = {c.plan: c.why_not for c in explained.candidates}
    assert "not compiled for weights of this format" in reasons["t64_p4_k1_s2"]
    assert explained.selected.memory_us > 1.8 * four.selected.memory_us
    for m in (1, 8, 64, 500, 4096):
        assert liquidgemm.explain_plan(m, 4096, 4096, bits=8, op="linear").launches == 2
    with pytest.raises(ValueError, match="bits: expected 4, 6 or 8, got 5"):
        liquidgemm.explain_plan(1, 64, 64, bits=5)
