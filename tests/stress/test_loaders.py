"""Damaged files at length: more than 10 000 checkpoints, and as many configs and states."""

import pytest
from mutations import check_checkpoints, check_configs, check_states

SHARDS = 8


@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_checkpoints(shard: int, stress_seed: int, tmp_path) -> None:
    """CHECKLIST 17, 19."""
    accepted = check_checkpoints(tmp_path, 1300, SHARDS * stress_seed + shard + 1)
    print(f"checkpoints: 1300 damaged, {accepted} still good")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_configs_and_states(shard: int, stress_seed: int) -> None:
    """CHECKLIST 17, 19."""
    seed = SHARDS * stress_seed + shard + 1
    print(f"configs: 2000 damaged, {check_configs(2000, seed)} still good")
    print(f"states: 500 damaged, {check_states(500, seed)} still good")
