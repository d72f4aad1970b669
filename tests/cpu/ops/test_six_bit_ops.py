"""6-bit codes by the ops of the CPU: every kernel set is exact, packing is lossless, errors."""

import pytest
import reference
import torch
from format_case import FormatCase, check_every_kernel, check_kernel, check_linear
from hypothesis import given, settings
from hypothesis import strategies as st

import liquidgemm
from liquidgemm import gemm, linear, pack_weight, unpack_weight
from liquidgemm.formats import liquidquant

KERNELS = liquidgemm.cpu_kernels()
OPS = torch.ops.liquidgemm
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore():
    yield
    liquidgemm.set_cpu_kernel()


def bits_of(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, 3 K / 4]`` of codes ``[N, K]``: a row is one number, its lowest byte first."""
    rows = []
    for row in codes.tolist():
        number = sum(code << 6 * i for i, code in enumerate(row))
        rows.append(list(number.to_bytes(len(row) * 6 // 8, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


class Case(FormatCase):
    def draw_weight(self, n, groups):
        self.codes, *grid, w8 = self.draw_grid(n, groups * 64, 64, 63, 4)
        self.logical = bits_of(self.codes), *grid
        return pack_weight(*self.logical), w8


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("extreme", [False, True])
def test_every_kernel_is_exact(kernel, extreme):
    """CHECKLIST 29: one and few tokens, whole tiles of them, rows and k that fill no block."""
    check_kernel(Case, kernel, extreme)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 67)),
    st.integers(1, 150),
    st.integers(1, 700),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_fuzz(m, n, k, seed, extreme):
    """CHECKLIST 17, 29: all sets on each example."""
    check_every_kernel(Case, m, n, k, seed, extreme)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_step(kernel):
    """CHECKLIST 3: codes that leave no room for others, and x = -128, which none may overflow."""
    liquidgemm.set_cpu_kernel(kernel)
    codes = torch.ones(2, 128, dtype=torch.long)
    codes[1] = 63
    step = torch.tensor([[255, 255], [4, 4]], dtype=torch.uint8)
    offset = torch.tensor([[0, 0], [3, 0]], dtype=torch.uint8)
    x = torch.full((17, 128), -128, dtype=torch.int8)
    x[1] = 127
    packed = pack_weight(bits_of(codes), step, offset)
    ones = torch.ones(17)
    got = gemm(x, ones, packed, ones[:2], out_dtype=torch.int32)
    per_k = torch.tensor([[127, 127], [127, 124]]).sum(1) * 64
    assert got[:2].tolist() == [(-128 * per_k).tolist(), (127 * per_k).tolist()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_quantizes_as_ever(kernel):
    check_linear(Case, kernel)


def test_packing_is_lossless():
    """CHECKLIST 4: every code at every place of a block; rows past N decode to 0."""
    codes = (torch.arange(256) + 3 * torch.arange(70)[:, None]) % 64
    step, offset = torch.ones(70, 4, dtype=torch.uint8), torch.full((70, 4), 9, dtype=torch.uint8)
    qweight = bits_of(codes)
    for layout in (qweight, qweight.T.contiguous().T, qweight.repeat_interleave(2, 1)[:, ::2]):
        packed = pack_weight(layout, step, offset)
        assert packed.shape == (2, 4, liquidquant.BLOCK_BYTES_6)
        assert packed.is_contiguous()
        for back, tensor in zip(unpack_weight(packed, 70), (qweight, step, offset), strict=True):
            reference.assert_same(back, tensor)
    w8 = OPS.dequantize_packed(packed, torch.ones(128), 256, torch.float32)
    assert (w8[70:] == 0).all()
    reference.assert_same(w8[:70], (codes + 9 - 128).float())


def test_codes_in_the_bits_of_a_row():
    codes = torch.randint(0, 64, (5, 192))
    qweight = liquidquant.pack_codes(codes.to(torch.uint8), 6)
    reference.assert_same(qweight, bits_of(codes))
    reference.assert_same(liquidquant.unpack_codes(qweight, 6).long(), codes)


def test_opcheck():
    """CHECKLIST 18."""
    c = Case(3, 70, 100)
    x = torch.randn(3, 100)
    for op, arguments in (
        ("pack_weight", c.logical),
        ("unpack_weight", (c.weight, 70)),
        ("gemm", (c.x, c.x_scale, c.weight, c.weight_scale)),
        ("linear", (x, c.weight, c.weight_scale, c.bias)),
        ("dequantize_packed", (c.weight, c.weight_scale, 100, torch.bfloat16)),
    ):
        torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_the_derivative_is_that_of_the_weight():
    """CHECKLIST 27."""
    c = Case(1, 70, 100)
    w = c.w8[:, :100].float() * c.weight_scale[:, None]
    reference.assert_same(OPS.dequantize_packed(c.weight, c.weight_scale, 100, torch.float32), w)
    x = torch.randn(3, 100, requires_grad=True)
    y = linear(x, c.weight, c.weight_scale)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference.assert_same(x.grad, grad @ w)


BYTES = torch.uint8


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        ("pack_weight", ((2, 48), (2, 1), (2, 2)), r"qoffset: expected shape \[2, 1\]"),
        ("pack_weight", ((2, 48), (3, 1), (2, 1)), r"qscale: expected shape \[2, 1\]"),
        ("pack_weight", ((2, 47), (2, 1), (2, 1)), "qweight: .*positive multiple of 64"),
        ("pack_weight", ((1, 99168), (1, 2066), (1, 2066)), "qweight: expected K <= 132160"),
        ("unpack_weight", ((2, 1, 3200), 64), "n: expected 65 to 128 .*got 64"),
        ("unpack_int8_weight", ((2, 1, 3200), 70), "4096.*from pack_int8_weight"),
    ],
)
def test_errors(op, shapes, message, device):
    """CHECKLIST 7, by the compiled ops and by the shape functions alike."""
    given = [torch.zeros(s, dtype=BYTES, device=device) if type(s) is tuple else s for s in shapes]
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*given)


def test_what_does_not_fit_a_byte_is_refused():
    """CHECKLIST 7."""
    qweight = torch.zeros(2, 48, dtype=BYTES)
    step, offset = torch.full((2, 1), 4, dtype=BYTES), torch.full((2, 1), 3, dtype=BYTES)
    qweight[1, 45:] = 255
    pack_weight(qweight, step, offset)
    assert liquidquant.first_infeasible(qweight, step, offset) is None
    offset[1] = 4
    with pytest.raises(RuntimeError, match="infeasible"):
        pack_weight(qweight, step, offset)
    assert liquidquant.first_infeasible(qweight, step, offset) == (1, 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_refuse_them(device):
    """There are no grouped kernels for them: in words, before anything is computed."""
    weight = torch.zeros(2, 1, 1, 3200, dtype=BYTES, device=device)
    x = torch.zeros(4, 64, dtype=torch.int8, device=device)
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    ones = torch.ones(4, device=device), torch.ones(2, 64, device=device)
    with pytest.raises(RuntimeError, match=r"in groups of 64, .*6-bit weights of"):
        OPS.grouped_gemm(x, ones[0], weight, ones[1], offsets, None, None, "none")


def test_plans():
    """What a GPU would run is known without one."""
    explained = liquidgemm.explain_plan(16, 4096, 4096, bits=6)
    four = liquidgemm.explain_plan(16, 4096, 4096)
    reasons = {c.plan: c.why_not for c in explained.candidates}
    assert "not compiled for weights of this format" in reasons["t64_p4_k1_s2"]
    assert explained.selected.memory_us > 1.4 * four.selected.memory_us
    for m in (1, 8, 64, 500, 4096):
        assert liquidgemm.explain_plan(m, 4096, 4096, bits=6, op="linear").launches == 2
