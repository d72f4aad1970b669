"""A share of the random cases that `make stress` runs 10 000 of."""

import os

from fuzz import run_cases

SEED = int(os.environ.get("SEED", "0"))


def test_random_cases() -> None:
    """CHECKLIST 17: shapes, strides, offsets, dtypes, bias, plan, split, groups."""
    run_cases(1000, SEED)
