"""The CPU kernels: each instruction set that this machine has equals the reference to the bit.

CHECKLIST 29. What the ops promise (shapes, layouts, errors) is in test_ops.py and
test_op_errors.py, which run with the fastest set; here the sets are forced in turn.
"""

import os

import pytest
import reference
import torch
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import TESTS
from test_ops import FLOATS, Case, special_rows

import liquidgemm
from liquidgemm import gemm, linear, pack_weight, quantize_activation

KERNELS = liquidgemm.cpu_kernels()
# Past the last token count at which another function takes over, in every set.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 17, 32, 33, 49, 64, 67)


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    liquidgemm.set_cpu_kernel()
    torch.set_num_threads(threads)


@pytest.fixture(params=KERNELS)
def kernel(request):
    liquidgemm.set_cpu_kernel(request.param)
    assert liquidgemm.cpu_kernel() == request.param
    return request.param


def extreme_logical(n: int, k: int, seed: int):
    """Groups at the ends of what is feasible: every s, and offsets that reach 255 and 0."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // 64)
    limit = torch.randint(0, 16, (n, groups), generator=generator)  # the largest code of a group
    step = torch.randint(0, 256, (n, groups), generator=generator)
    step = torch.where(limit * step > 255, 255 // limit.clamp(min=1), step)
    step[::3] = 255
    limit[::3] = 1
    offset = torch.where(torch.rand(n, groups, generator=generator) < 0.5, 255 - limit * step, 0)
    codes = torch.randint(0, 2, (n, groups, 64), generator=generator) * limit[..., None]
    codes = codes.flatten(1)
    qweight = codes[:, 0::2] | codes[:, 1::2] << 4
    return tuple(t.to(torch.uint8) for t in (qweight, step, offset))


class Extreme(Case):
    """Activations and weights at the ends of their ranges, where narrow sums would overflow."""

    def __init__(self, m, n, k, seed=0):
        super().__init__(m, n, k, seed)
        self.logical = extreme_logical(n, k, seed)
        self.weight = pack_weight(*self.logical)
        self.x = torch.where(self.x < 0, -127, 127).to(torch.int8)
        self.x[::2] = 127
        self.acc = reference.product(self.x, reference.decode(*self.logical))


@pytest.mark.parametrize("case", [Case, Extreme])
def test_every_kernel_is_exact(kernel, case):
    for m, n, k in ((1, 1, 1), (1, 200, 63), (5, 16, 65), (16, 130, 576), (33, 136, 1000)):
        c = case(m, n, k)
        reference.assert_same(c.gemm(out_dtype=torch.int32), c.acc.int(), m=m, n=n, k=k)
        for dtype in FLOATS:
            for bias in (None, c.bias, c.bias.half(), c.bias.bfloat16()):
                expected = reference.epilogue(c.acc, c.x_scale, c.weight_scale, bias, dtype)
                reference.assert_same(c.gemm(bias, dtype), expected, m=m, n=n, k=k, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TOKENS),
    st.integers(1, 150),
    st.integers(1, 1500),
    st.integers(0, 2**31),
    st.sampled_from([Case, Extreme]),
    st.sampled_from([1, 2]),
)
def test_fuzz(m, n, k, seed, case, threads):
    """CHECKLIST 17, 29: all sets on each example."""
    c = case(m, n, k, seed)
    expected = reference.epilogue(c.acc, c.x_scale, c.weight_scale, c.bias, torch.bfloat16)
    torch.set_num_threads(threads)
    for name in KERNELS:
        liquidgemm.set_cpu_kernel(name)
        context = {"kernel": name, "m": m, "n": n, "k": k, "seed": seed}
        reference.assert_same(c.gemm(out_dtype=torch.int32), c.acc.int(), **context)
        reference.assert_same(c.gemm(c.bias), expected, **context)


@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(kernel, m):
    """Rows of any batch equal those computed alone, in `linear` of every type too."""
    c = Case(m, 80, 200)
    reference.assert_same(c.gemm(out_dtype=torch.int32), c.acc.int(), m=m)
    for dtype in FLOATS:
        x = torch.randn(m, 200, generator=torch.Generator().manual_seed(m)).to(dtype)
        y = linear(x, c.weight, c.weight_scale, c.bias)
        x8, scale = reference.quantize_activation(x)
        acc = reference.product(x8, reference.decode(*c.logical))
        expected = reference.epilogue(acc, scale, c.weight_scale, c.bias, dtype)
        reference.assert_same(y, expected, m=m, dtype=dtype)


@pytest.mark.parametrize(("low", "m"), [(False, 2), (True, 2), (False, 17)])
def test_the_largest_sums(kernel, low, m):
    """CHECKLIST 3: at the largest K, which is no multiple of 64."""
    k, groups = 132104, 2065
    value = -128 if low else 127
    qweight = torch.full((2, groups * 32), 0 if low else 0xFF, dtype=torch.uint8)
    qscale = torch.full((2, groups), 17, dtype=torch.uint8)
    packed = pack_weight(qweight, qscale, torch.zeros(2, groups, dtype=torch.uint8))
    x = torch.full((m, k), 127, dtype=torch.int8)
    x[1] = -127
    got = gemm(x, torch.ones(m), packed, torch.ones(2), out_dtype=torch.int32)
    assert got[:2].tolist() == [[127 * value * k] * 2, [-127 * value * k] * 2]
    assert (got[2:] == 127 * value * k).all()


def test_many_tokens(kernel):
    """More than are arranged in one round."""
    c = Case(1500, 20, 1100)
    reference.assert_same(c.gemm(out_dtype=torch.int32), c.acc.int())
    expected = reference.epilogue(c.acc, c.x_scale, c.weight_scale, c.bias, torch.float32)
    reference.assert_same(c.gemm(c.bias, torch.float32), expected)


def test_unaligned_storage(kernel):
    """CHECKLIST 7: x, weight, scales and bias that start anywhere."""
    for m in (1, 16, 40):
        c = Case(m, 72, 200)
        expected = c.gemm(c.bias)
        shifted = {}
        for name in ("x", "x_scale", "weight", "weight_scale"):
            tensor = getattr(c, name)
            buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            shifted[name] = buffer.view(tensor.shape).copy_(tensor)
        reference.assert_same(c.gemm(c.bias, **shifted), expected, m=m)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activation(kernel, dtype):
    """CHECKLIST 8."""
    for x in (special_rows(), torch.randn(3, 1), torch.randn(5, 1000), torch.randn(2, 3, 65)):
        got = quantize_activation(x.to(dtype))
        for part, expected in zip(got, reference.quantize_activation(x.to(dtype)), strict=True):
            reference.assert_same(part, expected, dtype=dtype, shape=list(x.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_activation_of_every_16_bit_number(kernel, dtype):
    """CHECKLIST 8: as rows of their own and in rows of 64."""
    every = torch.arange(2**16).to(torch.uint16).view(dtype)
    for x in (every.unsqueeze(1), every[every.isfinite()].view(-1, 64)):
        for got, expected in zip(
            quantize_activation(x), reference.quantize_activation(x), strict=True
        ):
            reference.assert_same(got, expected, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_round_to_nearest_even(kernel, dtype):
    """Sums times a scale that covers overflow, ties, denormals, infinities and NaN."""
    c = Case(4, 64, 64)
    exponents = torch.arange(-160, 128, dtype=torch.float64)
    values = torch.cat(
        [2.0**exponents * f for f in (1.0, 1.5, 1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-9)]
    )
    values = torch.cat((values, torch.tensor([torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38])))
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).float()
    for scales in values.view(-1, 64):
        x = torch.zeros(4, 64, dtype=torch.int8)
        one = pack_weight(
            torch.full((64, 32), 0x11, dtype=torch.uint8),
            torch.ones(64, 1, dtype=torch.uint8),
            torch.full((64, 1), 128, dtype=torch.uint8),
        )
        x[:, 0] = torch.tensor([1, -1, 3, 127])
        y = gemm(x, torch.ones(4), one, scales, out_dtype=dtype)
        expected = (x[:, :1].float() * scales).to(dtype)
        reference.assert_same(y, expected, dtype=dtype)
    assert c.gemm().dtype == torch.bfloat16


def test_threads_share_a_weight(kernel):
    """Calls from several Python threads, and any number of threads in each."""
    from concurrent.futures import ThreadPoolExecutor

    c = Case(37, 600, 300)
    expected = c.acc.int()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: c.gemm(out_dtype=torch.int32), range(16)):
            reference.assert_same(got, expected)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        reference.assert_same(c.gemm(out_dtype=torch.int32), expected, threads=threads)


FORKED = """
import multiprocessing, sys
sys.path[:0] = sys.argv[1:]
import torch
import liquidgemm
from test_cpu import Case

c = Case(37, 600, 300)
torch.set_num_threads(2)
c.gemm(out_dtype=torch.int32)

def child(kernels):
    torch.set_num_threads(1)
    for name in kernels:
        liquidgemm.set_cpu_kernel(name)
        assert torch.equal(c.gemm(out_dtype=torch.int32), c.acc.int()), name

fork = multiprocessing.get_context("fork")
process = fork.Process(target=child, args=(liquidgemm.cpu_kernels(),))
process.start()
process.join(60)
print(process.exitcode)
process.kill()
"""


def test_a_forked_process():
    """With one thread it computes: the parent's threads are not in it, the permission to use AMX
    is."""
    result = run_python(FORKED, os.path.dirname(__file__), TESTS / "support")
    assert result.stdout.strip() == "0", result.stdout + result.stderr


def test_names():
    assert KERNELS[-2:] == ("portable", "reference")
    assert liquidgemm.cpu_kernel() == KERNELS[0]
    before = liquidgemm.cpu_kernel()
    with pytest.raises(ValueError, match=r"name: expected one of .*portable.* got 'sse9'"):
        liquidgemm.set_cpu_kernel("sse9")
    assert liquidgemm.cpu_kernel() == before
    liquidgemm.set_cpu_kernel("portable")
    liquidgemm.set_cpu_kernel(None)
    assert liquidgemm.cpu_kernel() == before


def test_reference_in_chunks(monkeypatch):
    """Chunks in both directions give what one piece does."""
    liquidgemm.set_cpu_kernel("reference")
    c = Case(50, 300, 200)
    expected = c.gemm(c.bias)
    x = torch.randn(3000, 33)
    whole = quantize_activation(x)
    monkeypatch.setattr(liquidgemm.ops._reference, "_CHUNK_BYTES", 8 * 200 * 7)
    reference.assert_same(c.gemm(c.bias), expected)
    for got, want in zip(quantize_activation(x), whole, strict=True):
        reference.assert_same(got, want)


ENVIRONMENT = """
import liquidgemm
print(liquidgemm.cpu_kernel())
"""


def test_the_environment_chooses(kernel):
    result = run_python(ENVIRONMENT, LIQUIDGEMM_CPU=kernel)
    assert result.stdout.strip() == kernel, result.stdout + result.stderr


def test_an_unknown_name_in_the_environment_is_refused():
    result = run_python(ENVIRONMENT, LIQUIDGEMM_CPU="sse9")
    assert result.returncode != 0
    assert "LIQUIDGEMM_CPU: name: expected one of" in result.stderr


LOWERED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from test_cpu import Case, Extreme, reference
import liquidgemm
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT", "the variable has no effect"
assert liquidgemm.cpu_kernel() == "reference"
for m, n, k in ((1, 64, 64), (33, 130, 896), (4, 64, 8192)):
    for case in (Case(m, n, k), Extreme(m, n, k)):
        reference.assert_same(case.gemm(out_dtype=torch.int32), case.acc.int(), m=m, n=n, k=k)
x = torch.randn(9, 576)
for got, expected in zip(
    torch.ops.liquidgemm.quantize_activation(x), reference.quantize_activation(x)
):
    reference.assert_same(got, expected)
print("exact")
"""


def test_reference_is_exact_with_the_instruction_set_lowered():
    """Without AVX-512 and VNNI, where INT8 products of other libraries may saturate."""
    result = run_python(
        LOWERED,
        os.path.dirname(__file__),
        TESTS / "support",
        LIQUIDGEMM_CPU="reference",
        ONEDNN_MAX_CPU_ISA="AVX2",
        ATEN_CPU_CAPABILITY="default",
        MKL_ENABLE_INSTRUCTIONS="AVX2",
    )
    assert result.stdout.strip() == "exact", result.stdout + result.stderr


# The quantizer's search.


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without fused multiply-adds torch.addcmul rounds twice",
)
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("shape", [(3, 1), (5, 64), (33, 576), (7, 130), (40, 1000)])
@pytest.mark.parametrize("bits", [4, 6])
def test_search_finds_the_same_grids(shape, group_size, bits):
    """Every set against plain torch: rows of zeros, denormals, constants, ties, and importance."""
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator)
    weight *= 10 ** torch.randint(-6, 3, (shape[0], 1), generator=generator).float()
    weight[0] = 0
    if shape[0] >= 5:
        weight[1] *= 1e-38
        weight[2] = 1
        weight[3] = weight[3].round()
    sparse = (torch.rand(shape[1], generator=generator) > 0.5).float() + 1e-9
    for importance in (None, torch.rand(shape[1], generator=generator) ** 3, sparse):
        liquidgemm.set_cpu_kernel("reference")
        expected = liquidgemm.quantize_weight(weight, group_size, importance=importance, bits=bits)
        for name in KERNELS[:-1]:
            liquidgemm.set_cpu_kernel(name)
            got = liquidgemm.quantize_weight(weight, group_size, importance=importance, bits=bits)
            for field in ("qweight", "qscale", "qoffset", "scale"):
                reference.assert_same(
                    getattr(got, field), getattr(expected, field), kernel=name, field=field
                )
