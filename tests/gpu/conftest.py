"""GPU tests run wherever a Hopper GPU is, and say why they are skipped elsewhere.

A Hopper GPU on which the library cannot run is a broken build: a failure, not a skip.
"""

import pytest
import torch

from liquidgemm import _library


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _hopper():
        return
    skip = pytest.mark.skip(reason=f"no Hopper GPU: {_library.status().reason}")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def library_loaded() -> None:
    if _hopper():
        status = _library.status()
        assert status.cuda_available, f"a Hopper GPU, but the kernels cannot run: {status.reason}"
