"""`linear` of very few tokens: a GEMM that quantizes its activations against the two kernels."""

import math

import pytest
import torch
from problems import (
    DEVICE,
    QUANTIZING,
    Problem,
    assert_equal,
    hard_rows,
    linear_in_one,
    linear_in_two,
    poison,
    random_problem,
)

import liquidgemm

DTYPES = [torch.bfloat16, torch.float16]
every_plan = pytest.mark.parametrize(("plan", "name"), QUANTIZING, ids=lambda v: str(v))


def fits(name: str, m: int, k: int) -> bool:
    """Whether m rows fit the registers of a CTA, and its share of them its shared memory."""
    stages = math.ceil(k / 256)
    share = math.ceil(stages / split_of(name)) * 256
    rows = 1 << (m - 1).bit_length()
    kib = 33 if "half" in name else 37
    return rows * stages * 256 <= 32 << 10 and (m | 1) * share <= kib << 10


def split_of(name: str) -> int:
    return int(name[-1]) if "split" in name else 1


def one_kernel(problem: Problem, x: torch.Tensor, plan: int, num_sms: int = 0) -> torch.Tensor:
    poison((len(x), len(problem.weight_scale)), x.dtype)
    return linear_in_one(problem, x, plan, num_sms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [8, 64, 200, 576, 1000, 2048, 4096, 7168])
@every_plan
def test_same_bits(plan: int, name: str, k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 1, 8, 9: every plan, every number of tokens, rows of every kind."""
    problem = random_problem(1, 328, k)
    x = hard_rows(k, dtype).to(DEVICE)
    expected = linear_in_two(problem, x)
    for m in range(1, 9):
        for rows in (slice(0, m), slice(12 - m, 12)):
            if fits(name, m, k):
                actual = one_kernel(problem, x[rows], plan)
                assert_equal(actual, expected[rows], f"{name} {k=} {m=} {rows} {dtype}")


@pytest.mark.parametrize("k", [14336, 28672, 36864])
@every_plan
def test_long_rows(plan: int, name: str, k: int) -> None:
    """CHECKLIST 2: more than a thread keeps in registers, up to all that a CTA can hold."""
    problem = random_problem(1, 200, k)
    x = torch.randn(2, k, device=DEVICE).bfloat16()
    expected = linear_in_two(problem, x)
    for m in (1, 2):
        if fits(name, m, k):
            assert_equal(one_kernel(problem, x[:m], plan), expected[:m], f"{name} {k=} {m=}")
        else:
            with pytest.raises(RuntimeError, match=f"cannot quantize {m} tokens of K = {k}"):
                one_kernel(problem, x[:m], plan)


@pytest.mark.parametrize("num_sms", [1, 2, 8, 66])
@every_plan
def test_few_sms(plan: int, name: str, num_sms: int) -> None:
    """CHECKLIST 9, 14: many tiles per CTA, which all use the tokens of the first."""
    problem = random_problem(1, 1928, 2880)
    x = torch.randn(5, 2880, device=DEVICE).bfloat16()
    if num_sms < split_of(name):
        pytest.skip("fewer SMs than CTAs in a cluster")
    assert_equal(one_kernel(problem, x, plan, num_sms), linear_in_two(problem, x), name)


@every_plan
def test_back_to_back(plan: int, name: str) -> None:
    """CHECKLIST 10, 12, 13: layers in a graph, each of which quantizes what the last one wrote."""
    problem = random_problem(1, 1024, 1024)
    problem.weight_scale /= 1024
    x = torch.randn(3, 1024, device=DEVICE).bfloat16()
    expected = x
    for _ in range(20):
        expected = linear_in_two(problem, expected)
    one_kernel(problem, x, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(20):
            y = one_kernel(problem, y, plan)
    for run in range(20):
        graph.replay()
        assert_equal(y, expected, f"{name} {run=}")


def test_is_used_where_it_pays() -> None:
    """One launch where it is one, two where it is not."""
    problem = random_problem(1, 28672, 1024)  # several tiles per CTA

    def kernels(x: torch.Tensor) -> int:
        liquidgemm.linear(x, problem.weight, problem.weight_scale)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            liquidgemm.linear(x, problem.weight, problem.weight_scale)
            torch.cuda.synchronize()
        return sum("gemm_kernel" in e.key or "quantize" in e.key for e in profile.key_averages())

    x = torch.randn(9, 1024, device=DEVICE)
    assert kernels(x[:1].bfloat16()) == 1
    assert kernels(x[:1].half()) == 1
    assert kernels(x[:1]) == 2
    assert kernels(x.bfloat16()) == 2


def test_what_it_cannot() -> None:
    """CHECKLIST 7: asked for by name, it says so."""
    problem = random_problem(1, 64, 64)
    misaligned = torch.zeros(65, device=DEVICE).half()[1:][None]
    for x in (
        torch.zeros(9, 64, device=DEVICE).half(),
        torch.zeros(1, 64, device=DEVICE),
        misaligned,
    ):
        with pytest.raises(RuntimeError, match="cannot quantize"):
            one_kernel(problem, x, QUANTIZING[0][0])
