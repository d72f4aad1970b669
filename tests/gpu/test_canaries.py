"""Nothing but the output is written, and all of it is.

The ops allocate their outputs, so there is no strided `out`; the kernel's rows that are no multiple
of four elements, and with them its other store path, come from N.
"""

import pytest
import torch
from arena import SMALLEST, Arena
from problems import (
    DEVICE,
    QUANTIZING,
    assert_equal,
    linear_in_one,
    linear_in_two,
    random_problem,
    run,
)

import liquidgemm
from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32]
TOKENS = [(1, 64), (3, 64), (9, 64), (70, 320), (257, 64), (300, 320)]  # M, and K


def columns(m: int, itemsize: int, residue: int) -> int:
    """The fewest columns, with this residue modulo 64, of an output of at least SMALLEST bytes."""
    return -(-SMALLEST // (m * itemsize * 64)) * 64 + residue


@pytest.mark.parametrize("residue", [8, 61, 62, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_around_the_output_of_gemm(dtype: torch.dtype, residue: int) -> None:
    """CHECKLIST 6: guards before and after the output, which starts as NaN; every plan."""
    arena = Arena(4 * SMALLEST)
    for m, k in TOKENS:
        n = columns(m, dtype.itemsize, residue)
        problem = random_problem(m, n, k)
        bias = dtype.is_floating_point
        expected = problem.output(dtype, bias) if bias else problem.accumulator()
        for plan, name in PLANS:
            what = f"{name} {m=} {n=} {dtype}"
            with arena.allocating():
                y = run(problem, dtype, bias, plan, poisoned=False)
            arena.check(y, what=what)
            assert_equal(y, expected, what)
            del y


@pytest.mark.parametrize("residue", [8, 61, 62, 63])
def test_around_the_output_of_linear(residue: int) -> None:
    """CHECKLIST 6: the plans that quantize, for few tokens."""
    arena = Arena(4 * SMALLEST)
    for m, k in ((1, 64), (3, 200)):
        n = columns(m, 2, residue)
        problem = random_problem(m, n, k)
        x = torch.randn(m, k, device=DEVICE).half()
        expected = linear_in_two(problem, x)
        for plan, name in QUANTIZING:
            with arena.allocating():
                y = linear_in_one(problem, x, plan)
            arena.check(y, what=f"{name} {m=} {n=}")
            assert_equal(y, expected, f"{name} {m=} {n=}")
            del y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [5, 8, 67])
def test_around_the_outputs_of_quantize_activation(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 6: both outputs, vector and scalar paths."""
    m = SMALLEST // 4 + 3
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    expected = liquidgemm.quantize_activation(x)
    arena = Arena(m * (k + 4) + SMALLEST)
    with arena.allocating():
        x8, scale = liquidgemm.quantize_activation(x)
    arena.check(x8, scale, what=f"{k=} {dtype}")
    assert_equal(x8, expected[0], "x8")
    assert_equal(scale, expected[1], "scale")


def test_a_write_past_the_end_is_seen() -> None:
    """CHECKLIST 6: the guards themselves, with one wrong byte on either side."""
    arena = Arena(4 * SMALLEST)
    with arena.allocating():
        y = torch.zeros(SMALLEST + 1, dtype=torch.uint8, device=DEVICE)
    arena.check(y, what="clean")
    begin = y.data_ptr() - arena.address
    for at in (begin - 1, begin + y.nbytes):
        arena.bytes[at] = 0
        with pytest.raises(AssertionError, match=f"1 bytes changed .*first at {at};"):
            arena.check(y, what="planted")
        arena.bytes[at] = 0xFF
