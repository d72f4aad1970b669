"""Which kernel runs a grouped product: a pure function of what the host knows."""

import itertools

import pytest

from liquidgemm.ops.plans import grouped_plan, grouped_plan_names


def plan_of(rows: int, experts: int, n: int, k: int, **gpu) -> str:
    return grouped_plan(rows, experts, n, k, **gpu).split("plan ")[1].split(",")[0]


def tokens_of(plan: str) -> int:
    return int(plan.split("_")[0][1:])


def test_names_are_distinct() -> None:
    names = grouped_plan_names()
    assert len(set(names)) == len(names) > 10


@pytest.mark.parametrize("experts", [1, 8, 128, 1024])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (1536, 2048), (28672, 4096)])
def test_every_problem_has_a_plan(experts: int, n: int, k: int) -> None:
    for rows in (1, 2, 7, 64, 1000, 32768, 10**6):
        for num_sms in (1, 8, 132):
            assert plan_of(rows, experts, n, k, num_sms=num_sms) in grouped_plan_names()


def test_tiles_grow_with_rows_per_expert() -> None:
    for n, k in ((1536, 2048), (4096, 14336)):
        heights = [tokens_of(plan_of(32 * rows, 32, n, k)) for rows in (1, 4, 16, 64, 256, 1024)]
        assert heights[0] <= 16
        assert heights[-1] >= 128
        assert all(later >= earlier / 2 for earlier, later in itertools.pairwise(heights))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="experts: expected 1 to"):
        grouped_plan(1, 0, 1, 1)
    with pytest.raises(RuntimeError, match="memory_tbps: expected a positive number"):
        grouped_plan(1, 1, 1, 1, memory_tbps=0)
