"""Bad arguments at random: every CPU kernel says what tracing says, before it computes anything."""

import bad_arguments
import pytest
from hypothesis import given, settings

from liquidgemm import cpu_kernels, set_cpu_kernel


@pytest.fixture(params=cpu_kernels(), autouse=True, scope="module")
def kernel(request: pytest.FixtureRequest):
    set_cpu_kernel(request.param)
    yield
    set_cpu_kernel()


def test_arguments_that_are_not_changed_are_good() -> None:
    for op, arguments in bad_arguments.GOOD.items():
        assert isinstance(bad_arguments.outcome(op, arguments, "cpu"), list), op


@settings(max_examples=120, deadline=None)
@given(bad_arguments.calls())
def test_the_words_are_those_of_tracing(call: tuple[str, dict]) -> None:
    """CHECKLIST 7, 17: or dtypes and shapes of the results, where nothing is wrong."""
    op, arguments = call
    said = bad_arguments.outcome(op, arguments, "cpu")
    assert said == bad_arguments.outcome(op, arguments, "meta")
    if isinstance(said, str):
        name, _, rest = said.partition(": ")
        assert name in arguments
        assert "expected " in rest
        assert ", got " in rest
