"""Weights in groups of 32 by the ops of the CPU: every kernel set is exact, packing is lossless,
errors."""

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
BYTES = torch.uint8


@pytest.fixture(autouse=True)
def restore():
    yield
    liquidgemm.set_cpu_kernel()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(BYTES)


class Case(FormatCase):
    def draw_weight(self, n, groups):
        codes, *grid, w8 = self.draw_grid(n, groups * 64, 32, 15, 17)
        self.logical = nibbles(codes), *grid
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
    """CHECKLIST 3: one group leaves no room for other codes, its neighbour has all of them, and
    x = -128, which none may overflow."""
    liquidgemm.set_cpu_kernel(kernel)
    codes = torch.ones(2, 128, dtype=torch.long)
    codes[:, 32:64], codes[:, 96:] = 15, 0
    step = torch.tensor([[255, 17, 255, 0], [1, 17, 1, 255]], dtype=BYTES)
    offset = torch.tensor([[0, 0, 0, 255], [254, 0, 0, 0]], dtype=BYTES)
    x = torch.full((17, 128), -128, dtype=torch.int8)
    x[1] = 127
    packed = pack_weight(nibbles(codes), step, offset)
    ones = torch.ones(17)
    got = gemm(x, ones, packed, ones[:2], out_dtype=torch.int32)
    of_groups = torch.tensor([[127, 127, 127, 127], [127, 127, -127, -128]]).sum(1) * 32
    assert got[:2].tolist() == [(-128 * of_groups).tolist(), (127 * of_groups).tolist()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_quantizes_as_ever(kernel):
    check_linear(Case, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_neighbours_are_groups_of_64(kernel):
    """The same bits as by the kernels of the format that they could be stored in."""
    liquidgemm.set_cpu_kernel(kernel)
    c = Case(21, 100, 300)
    qweight, step, offset = c.logical
    step, offset = step[:, ::2], offset[:, ::2]
    wide = [t.repeat_interleave(2, 1) for t in (step, offset)]
    for out_dtype in (torch.int32, torch.bfloat16):
        one, other = (
            gemm(c.x, c.x_scale, pack_weight(qweight, *grid), c.weight_scale, None, out_dtype)
            for grid in ((step, offset), wide)
        )
        reference.assert_same(one, other)


def test_packing_is_lossless():
    """CHECKLIST 4: every code at every place of a block; rows past N decode to 0."""
    codes = (torch.arange(256) + 3 * torch.arange(70)[:, None]) % 16
    step = (torch.arange(8) + torch.arange(70)[:, None]) % 17 + 1
    offset = 255 - 15 * step
    qweight, step, offset = nibbles(codes), step.to(BYTES), offset.to(BYTES)
    for layout in (qweight, qweight.T.contiguous().T, qweight.repeat_interleave(2, 1)[:, ::2]):
        packed = pack_weight(layout, step, offset)
        assert packed.shape == (2, 4, liquidquant.BLOCK_BYTES_G32)
        assert packed.is_contiguous()
        for back, tensor in zip(unpack_weight(packed, 70), (qweight, step, offset), strict=True):
            reference.assert_same(back, tensor)
    w8 = OPS.dequantize_packed(packed, torch.ones(128), 256, torch.float32)
    assert (w8[70:] == 0).all()
    grids = (t.repeat_interleave(32, 1).float() for t in (step, offset))
    reference.assert_same(w8[:70], codes * next(grids) + next(grids) - 128)


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
    x = torch.randn(3, 100, requires_grad=True)
    y = linear(x, c.weight, c.weight_scale)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference.assert_same(x.grad, grad @ w)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        ("pack_weight", ((2, 32), (2, 2), (2, 1)), r"qoffset: expected shape \[2, 2\]"),
        ("pack_weight", ((2, 32), (3, 2), (2, 2)), r"qscale: expected shape \[2, 2\]"),
        ("pack_weight", ((2, 32), (2, 4), (2, 4)), r"qscale: expected shape \[2, 1\]"),
        ("pack_weight", ((2, 16), (2, 1), (2, 1)), "qweight: .*positive multiple of 64"),
        ("pack_weight", ((1, 66112), (1, 4132), (1, 4132)), "qweight: expected K <= 132160"),
        ("unpack_weight", ((2, 1, 2304), 64), "n: expected 65 to 128 .*got 64"),
        ("unpack_int8_weight", ((2, 1, 2304), 70), "4096.*from pack_int8_weight"),
    ],
)
def test_errors(op, shapes, message, device):
    """CHECKLIST 7, by the compiled ops and by the shape functions alike."""
    given = [torch.zeros(s, dtype=BYTES, device=device) if type(s) is tuple else s for s in shapes]
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*given)


def test_what_does_not_fit_a_byte_is_refused():
    """CHECKLIST 7: of either group."""
    for group in (0, 1):
        codes = torch.zeros(2, 64, dtype=torch.long)
        step, offset = torch.full((2, 2), 17, dtype=BYTES), torch.zeros(2, 2, dtype=BYTES)
        codes[1, 32 * group + 31] = 15
        offset[:, 1 - group] = 255
        qweight = nibbles(codes)
        pack_weight(qweight, step, offset)
        assert liquidquant.first_infeasible(qweight, step, offset) is None
        offset[1, group] = 1
        with pytest.raises(RuntimeError, match="infeasible"):
            pack_weight(qweight, step, offset)
        assert liquidquant.first_infeasible(qweight, step, offset) == (1, group)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_refuse_them(device):
    """There are no grouped kernels for them: in words, before anything is computed."""
    weight = torch.zeros(2, 1, 1, 2304, dtype=BYTES, device=device)
    x = torch.zeros(4, 64, dtype=torch.int8, device=device)
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    ones = torch.ones(4, device=device), torch.ones(2, 64, device=device)
    message = r"weight: expected 4-bit weights in groups of 64, .*got group-of-32 weights of"
    with pytest.raises(RuntimeError, match=message):
        OPS.grouped_gemm(x, ones[0], weight, ones[1], offsets, None, None, "none")


def test_plans():
    """What a GPU would run is known without one."""
    explained = liquidgemm.explain_plan(16, 4096, 4096, group_size=32)
    of_64 = liquidgemm.explain_plan(16, 4096, 4096)
    reasons = {c.plan: c.why_not for c in explained.candidates}
    assert "not compiled for weights of this format" in reasons["t64_p4_k1_s2"]
    assert explained.selected.memory_us > 1.01 * of_64.selected.memory_us
    for m in (1, 8, 64, 500, 4096):
        assert liquidgemm.explain_plan(m, 4096, 4096, group_size=32, op="linear").launches == 2
    with pytest.raises(ValueError, match="group_size: expected 64 with 6 bits, got 32"):
        liquidgemm.explain_plan(16, 4096, 4096, bits=6, group_size=32)
    with pytest.raises(ValueError, match="group_size: expected 64 or 32 with 4 bits, got 128"):
        liquidgemm.explain_plan(16, 4096, 4096, group_size=128)
