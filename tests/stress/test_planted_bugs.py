"""The suite catches planted bugs, and passes in spite of random delays."""

import pytest
from bugs import BUGS, DELAY, Bug
from hunt import EXACTNESS, WATCHDOG, catch, control, run_tests
from variants import NONE, build_variant

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def clean_build() -> None:
    """The tests that are to catch bugs pass where there is none."""
    build_variant(NONE)
    bad = [outcome for outcome in control(list(BUGS)) if outcome.verdict != "passed"]
    assert not bad, bad


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug, clean_build: None) -> None:
    """CHECKLIST 6, 13, 15: by the tests that the list of bugs names."""
    build_variant(bug)
    outcome = catch(bug)
    assert outcome.caught, outcome


@pytest.mark.parametrize("selection", EXACTNESS)
def test_random_delays(selection: str) -> None:
    """CHECKLIST 16: pauses wherever one role waits for another; the exactness suite passes."""
    outcome = run_tests(build_variant(DELAY), selection, 3 * WATCHDOG)
    assert outcome.verdict == "passed", outcome
