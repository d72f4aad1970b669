"""Everything in this folder is a GPU test: tests/conftest.py has the rule by which those run."""

import os

import pytest

# A kernel that hangs cannot be interrupted: the watchdog ends the process (CHECKLIST 14).
WATCHDOG = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if "SANITIZING" not in os.environ:
                item.add_marker(pytest.mark.timeout(WATCHDOG, method="thread"))
