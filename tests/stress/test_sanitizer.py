"""compute-sanitizer at length: the small suite is also what `make sanitize` runs."""

import shutil

import pytest
from bugs import BUGS, EVERY_LANE, Bug
from sanitize import TOOLS, sanitize, watched_by
from variants import build_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"
    ),
]


@pytest.mark.parametrize("tool", TOOLS)
def test_no_findings(tool: str) -> None:
    """CHECKLIST 15: over the small suite."""
    package = build_variant(EVERY_LANE) if tool == "racecheck" else None
    found, output = sanitize(tool, package, watched_by(tool))
    assert found == 0, output[-6000:]


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.tool], ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    """CHECKLIST 15: an out-of-bounds write by memcheck, a race by racecheck."""
    found, output = sanitize(bug.tool, build_variant(bug), watched_by(bug.tool))
    assert found > 0, output[-6000:]
