"""Fuzzing at length, on the GPU."""

import pytest
from fuzz import run_cases

SHARDS = 24
CASES = 500  # per shard: 12 000 in all


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_cases(shard: int, stress_seed: int) -> None:
    """CHECKLIST 17: a seed of its own for every shard; it is printed, and gives the same cases."""
    run_cases(CASES, SHARDS * stress_seed + shard + 1)
