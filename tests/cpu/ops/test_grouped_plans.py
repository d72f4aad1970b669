"""Which kernel runs a grouped product: a pure function of what the host knows."""

import itertools

import pytest
import torch

from liquidgemm.ops.plans import grouped_plan, grouped_plan_names, moe_plan, slot_plan_names


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


def test_few_tokens_take_products_by_slots() -> None:
    """As many as a CTA can quantize; the plans are such as are compiled."""
    for tokens, top_k, experts, hidden, inner in ((1, 8, 128, 2048, 768), (1, 2, 8, 4096, 14336)):
        plan = moe_plan(tokens, top_k, experts, hidden, inner)
        assert plan.startswith("3 launches")
        chosen = [part.split(",")[0] for part in plan.split("plan ")[1:]]
        assert set(chosen) <= set(slot_plan_names())
        for other in (
            moe_plan(tokens, top_k, experts, hidden, inner, dtype=torch.float32),
            moe_plan(16, top_k, experts, hidden, inner),
        ):
            assert other.startswith("6 launches")


def test_experts_that_are_spread_have_plans_for_their_share_of_the_rows() -> None:
    """32 of 256 experts: an eighth of the slots, whatever the tokens of all GPUs are."""
    for tokens in (64, 512, 4096):
        spread = moe_plan(tokens, 8, 32, 7168, 2048, total_experts=256)
        assert f"R = {tokens} of {8 * tokens}," in spread
        for part, (n, k) in zip(spread.split("then"), ((4096, 7168), (7168, 2048)), strict=True):
            assert part.split("plan ")[1].split(",")[0] == plan_of(tokens, 32, n, k)
    assert "R = 1 of 16," in moe_plan(2, 8, 1, 512, 512, total_experts=256)
    assert moe_plan(2, 8, 4, 512, 512, total_experts=4) == moe_plan(2, 8, 4, 512, 512)
    with pytest.raises(RuntimeError, match="total_experts: expected at least the 8 experts here"):
        moe_plan(1, 1, 8, 64, 64, total_experts=7)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="experts: expected 1 to"):
        grouped_plan(1, 0, 1, 1)
    with pytest.raises(RuntimeError, match="memory_tbps: expected a positive number"):
        grouped_plan(1, 1, 1, 1, memory_tbps=0)
