"""Tests that take longer: `make stress`, in slices and with a seed if wanted.

SLICE=2/6 runs every sixth test, from the second on; SEED=7 draws other random cases.
"""

import os
import re

import pytest

SEED = int(os.environ.get("SEED", "0"))
WATCHDOG = 900


def slice_of(text: str) -> tuple[int, int]:
    """(2, 6) for "2/6".

    Raises:
        ValueError: not of this form, or no such slice.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"SLICE: expected i/n with 1 <= i <= n, got {text!r}")
    return int(match[1]), int(match[2])


def pytest_report_header() -> str:
    return f"SEED={SEED} SLICE={os.environ.get('SLICE', '1/1')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if "stress" in item.path.parts]
    index, count = slice_of(os.environ.get("SLICE", "1/1"))
    left_out = {item for i, item in enumerate(ours) if i % count != index - 1}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    for item in ours:
        item.add_marker(pytest.mark.timeout(WATCHDOG, method="thread"))


@pytest.fixture(scope="session")
def stress_seed() -> int:
    return SEED
