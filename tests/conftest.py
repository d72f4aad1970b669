"""Settings of the whole suite, and the rule by which GPU tests run."""

import gc
import os

import pytest
from hypothesis import settings

from liquidgemm.ops import _library

# Failing examples are printed as a blob that reproduces them (CHECKLIST 17).
settings.register_profile("default", deadline=None, print_blob=True, max_examples=50)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header() -> str:
    """Which library is tested: there may be several, see tests/planted."""
    return f"liquidgemm: {_library.CUDA_LIBRARY}"


def pytest_runtest_setup(item):
    """Skips a GPU test without a Hopper GPU; beside one, a missing library is a failure."""
    if item.get_closest_marker("gpu") is None:
        return
    status = _library.status()
    if not _library.hopper_devices():
        pytest.skip(status.reason)
    if not status.cuda_available:
        pytest.fail(status.reason, pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_the_module_alone():
    """What is there before a module stays: accelerate collects garbage with every model that it
    loads, and would look through all of torch and transformers each time."""
    gc.collect()
    gc.freeze()
