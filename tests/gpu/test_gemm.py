"""The kernel against an exact integer reference."""

from dataclasses import replace

import pytest
import torch
from problems import DEVICE, assert_equal, random_problem, run, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tile_tokens(name: str) -> int:
    return int(name.split("_")[0][1:])


@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_every_plan_is_exact(plan: int, name: str) -> None:
    """CHECKLIST 1: every compiled plan, whole tiles and ragged edges."""
    tokens = tile_tokens(name)
    sizes = [
        (1, 64, 64),
        (tokens, 256, 512),
        (tokens + 1, 264, 2880),
        (3, 8, 576),
        (2 * tokens + 5, 4864, 896),
        (3, 72, 12352),  # more stages than any ring has
    ]
    for m, n, k in sizes:
        problem = random_problem(m, n, k, seed=m + n + k)
        expected = problem.accumulator()
        for num_sms in (0, 8, 3):
            actual = run(problem, plan=plan, num_sms=num_sms)
            assert_equal(actual, expected, f"{name} num_sms={num_sms} {m=} {n=} {k=}")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_epilogue_is_the_documented_formula(
    plan: int, name: str, dtype: torch.dtype, bias: bool
) -> None:
    """CHECKLIST 1: scales, bias and rounding, bit for bit."""
    for n in (136, 137, 138):  # rows of y aligned to four elements, and not
        problem = random_problem(tile_tokens(name) + 3, n, 640)
        actual = run(problem, dtype, bias, plan)
        assert_equal(actual, problem.output(dtype, bias), f"{name} n={n}")


SPECIAL = [1.0, 0.0, -0.0, -0.75, 1e-30, 1e-40, -1e-44, 3e38, float("inf"), float("nan")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_of_special_scales(dtype: torch.dtype, bias: bool) -> None:
    """CHECKLIST 1: zeros of both signs, denormals, overflow and NaN, by the same formula."""
    special = torch.tensor(SPECIAL, device=DEVICE)
    for n in (136, 137):
        problem = random_problem(40, n, 640)
        problem.x[::3] = 0  # sums of zero, too
        problem.x_scale = special.repeat(4)
        problem.weight_scale = special.repeat_interleave(14)[:n]
        problem.bias = special.repeat(14)[:n] if bias else problem.bias
        expected = problem.output(dtype, bias)
        assert_equal(run(problem, dtype, bias), expected, f"{n=}")
        for plan, name in PLANS:
            actual = run(problem, dtype, bias, plan)
            assert_equal(actual, expected, f"{name} {n=}")


def test_every_m() -> None:
    """CHECKLIST 2: M = 1 .. 257, and beyond."""
    largest = random_problem(8193, 136, 576)
    expected = largest.accumulator()
    for m in [*range(1, 258), 511, 512, 513, 1023, 4095, 4097, 8193]:
        y = liquidgemm.gemm(
            largest.x[:m],
            largest.x_scale[:m],
            largest.weight,
            largest.weight_scale,
            out_dtype=torch.int32,
        )
        assert_equal(y, expected[:m], f"m={m}")


@pytest.mark.parametrize("n", [8, 16, 64, 72, 128, 136, 192, 576, 896, 4864])
def test_every_n_and_k(n: int) -> None:
    """CHECKLIST 2: N from one octet, K = 64 .. 2112 and those of real models, some no multiple of
    64."""
    sizes = [
        *(64 * i for i in range(1, 34)),
        896,
        1376,
        2880,
        5472,
        10944,
        11008,
        18944,
        29568,
        100,
        33,
        1,
    ]
    for k in sizes:
        for m in (5, 130):
            problem = random_problem(m, n, k, seed=n + k)
            assert_equal(run(problem), problem.accumulator(), f"{m=} {n=} {k=}")


def test_no_tokens() -> None:
    """CHECKLIST 2: M = 0."""
    problem = random_problem(0, 72, 128)
    assert run(problem, torch.bfloat16).shape == (0, 72)


@pytest.mark.parametrize("k", [131_072, 132_104])
@pytest.mark.parametrize("m", [1, 16, 100, 300])
def test_saturation(m: int, k: int) -> None:
    """CHECKLIST 3: the largest sums that fit, at both ends, up to the largest K. That one is no
    multiple of 64: the weight goes on, and so do the largest values in it."""
    n, blocks = 128, -(-k // 64)
    for x_value, code, w_value in [
        (127, 15, 127),
        (-127, 15, 127),
        (127, 0, -128),
        (-127, 0, -128),
    ]:
        qweight = torch.full((n, blocks * 32), code * 17, dtype=torch.uint8, device=DEVICE)
        qscale = torch.full((n, blocks), 17, dtype=torch.uint8, device=DEVICE)
        qoffset = torch.zeros((n, blocks), dtype=torch.uint8, device=DEVICE)
        weight = liquidgemm.pack_weight(qweight, qscale, qoffset)
        x = torch.full((m, k), x_value, dtype=torch.int8, device=DEVICE)
        ones = torch.ones(max(m, n), device=DEVICE)
        y = liquidgemm.gemm(x, ones[:m], weight, ones[:n], out_dtype=torch.int32)
        expected = torch.full((m, n), x_value * w_value * k, dtype=torch.int32, device=DEVICE)
        assert_equal(y, expected, f"x={x_value} w={w_value} {m=} {k=}")
        for plan, name in PLANS:
            y = testing.gemm_with_plan(x, ones[:m], weight, ones[:n], None, torch.int32, plan, 0)
            assert_equal(y, expected, f"{name} x={x_value} w={w_value} {m=} {k=}")


@pytest.mark.parametrize("n", [72, 512])
def test_batch_invariance(n: int) -> None:
    """CHECKLIST 9: a row alone equals the same row at any place of any batch, under any
    plan, on all SMs and on few."""
    problem = random_problem(300, n, 1088)
    alone = torch.cat([run(row_of(problem, i), torch.bfloat16, True) for i in (0, 7, 150, 299)])
    for m_begin, m_end in [(0, 300), (0, 8), (7, 8), (100, 200), (150, 300)]:
        part = rows_of(problem, m_begin, m_end)
        for plan, name in PLANS:
            for num_sms in (0, 24):
                y = run(part, torch.bfloat16, True, plan, num_sms)
                for expected, i in zip(alone, (0, 7, 150, 299), strict=True):
                    if m_begin <= i < m_end:
                        assert_equal(y[i - m_begin], expected, f"{name} row {i}")


def row_of(problem, i: int):
    return rows_of(problem, i, i + 1)


def rows_of(problem, begin: int, end: int):
    return replace(problem, x=problem.x[begin:end], x_scale=problem.x_scale[begin:end])


def test_inputs_of_any_layout() -> None:
    """CHECKLIST 7: strides, offsets, leading dimensions; the result does not change."""
    problem = random_problem(24, 136, 592)
    expected = problem.accumulator()
    x, scale = problem.x, problem.x_scale
    wide = torch.zeros(24, 700, dtype=torch.int8, device=DEVICE)
    wide[:, 5 : 5 + 592] = x
    flat = torch.zeros(24 * 592 + 3, dtype=torch.int8, device=DEVICE)
    flat[3:] = x.flatten()
    aligned = torch.zeros(24, 704, dtype=torch.int8, device=DEVICE)
    aligned[:, :592] = x
    layouts = {
        "offset columns": wide[:, 5 : 5 + 592],
        "odd storage offset": flat[3:].view(24, 592),
        "aligned row stride": aligned[:, :592],
        "transposed": x.T.contiguous().T,
        "every other row": x.repeat_interleave(2, 0)[::2],
    }
    for name, view in layouts.items():
        y = liquidgemm.gemm(
            view, scale, problem.weight, problem.weight_scale, out_dtype=torch.int32
        )
        assert_equal(y, expected, name)
    batched = liquidgemm.gemm(
        x.view(2, 3, 4, 592),
        scale.view(2, 3, 4),
        problem.weight,
        problem.weight_scale,
        out_dtype=torch.int32,
    )
    assert_equal(batched, expected.view(2, 3, 4, 136), "leading dimensions")
    vector = liquidgemm.gemm(
        x[3], scale[3], problem.weight, problem.weight_scale, out_dtype=torch.int32
    )
    assert_equal(vector, expected[3], "one token, no batch dimension")
    same = x[:1].expand(24, 592)
    y = liquidgemm.gemm(same, scale, problem.weight, problem.weight_scale, out_dtype=torch.int32)
    assert_equal(y, expected[:1].expand(24, 136), "stride 0")
    offset_weight = torch.zeros(problem.weight.numel() + 1, dtype=torch.uint8, device=DEVICE)
    offset_weight[1:] = problem.weight.flatten()
    y = liquidgemm.gemm(
        x,
        scale,
        offset_weight[1:].view(problem.weight.shape),
        problem.weight_scale,
        out_dtype=torch.int32,
    )
    assert_equal(y, expected, "weight at an odd address")


def test_infeasible_weights_are_refused() -> None:
    """CHECKLIST 4: on the GPU as on the CPU."""
    qweight = torch.full((64, 32), 0xFF, dtype=torch.uint8, device=DEVICE)
    ok = torch.full((64, 1), 17, dtype=torch.uint8, device=DEVICE)
    zero = torch.zeros_like(ok)
    liquidgemm.pack_weight(qweight, ok, zero)
    with pytest.raises(RuntimeError, match="pack_weight: the weights are infeasible"):
        liquidgemm.pack_weight(qweight, ok, zero + 1)


def test_side_stream() -> None:
    """CHECKLIST 11: the current stream is the one that is used."""
    problem = random_problem(64, 1024, 4096)
    expected = problem.accumulator()
    x = torch.zeros_like(problem.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(problem.x)
        y = liquidgemm.gemm(
            x, problem.x_scale, problem.weight, problem.weight_scale, out_dtype=torch.int32
        )
    stream.synchronize()
    assert_equal(y, expected, "side stream")


def test_repetition() -> None:
    """CHECKLIST 10: the same bits, a thousand times."""
    problem = random_problem(48, 1536, 4096)
    first = run(problem)
    assert_equal(first, problem.accumulator(), "first")
    for i in range(1000):
        assert torch.equal(run(problem), first), f"run {i} differs"


@pytest.mark.parametrize("m", [32, 100])
def test_back_to_back_launches(m: int) -> None:
    """CHECKLIST 10, 13: launches that overlap, several tiles per CTA, the whole ring in flight.

    Each launch begins while the one before still runs, so that loads complete out of order.
    """
    problem = random_problem(m, 28_672, 4096)
    expected = problem.accumulator()
    for plan, name in PLANS:
        for _ in range(60):
            y = run(problem, plan=plan, poisoned=False)
        assert_equal(y, expected, f"{name} {m=}")
