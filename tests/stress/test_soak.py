"""The same bits for minutes: every plan, launches that overlap, beside other work."""

import pytest
import torch
from problems import DEVICE, random_problem, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_overlapping_launches(plan: int, name: str) -> None:
    """CHECKLIST 10, 13: thousands of launches back to back, a quarter of them beside a hog."""
    hog = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for m, n, k in ((1, 4096, 4096), (33, 1536, 2880), (130, 6144, 1088), (300, 72, 11_008)):
        problem = random_problem(m, n, k, seed=m)
        expected = problem.accumulator()
        torch.cuda.synchronize()
        for i in range(300):
            if i % 4 == 0 and i >= 225:
                with torch.cuda.stream(hog):
                    torch.mm(busy, busy)
            y = testing.gemm_with_plan(
                problem.x,
                problem.x_scale,
                problem.weight,
                problem.weight_scale,
                None,
                torch.int32,
                plan,
                (0, 0, 0, 16, 66)[i % 5],
            )
            if i % 10 == 9:  # the others overlap with nothing in between
                wrong += (y != expected).any()
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{name}: {wrong.item()} comparisons failed"


@pytest.mark.parametrize("m", [1, 7, 40, 120, 500])
def test_a_chain_of_layers(m: int) -> None:
    """CHECKLIST 10, 13: each layer reads what the one before has just written, 2000 times over."""
    up, down = random_problem(1, 1536, 576), random_problem(1, 576, 1536)
    x = torch.randn(m, 576, device=DEVICE).bfloat16()

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden = liquidgemm.linear(x, up.weight, up.weight_scale)
        return liquidgemm.linear(hidden, down.weight, down.weight_scale)

    expected = block(x)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(2000):
        wrong += (block(x) != expected).any()
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{wrong.item()} of 2000 runs differ, {m=}"
