"""tests/support/sanitize.py tells a clean run from one that did not happen."""

import re
from itertools import pairwise

import pytest
import sanitize

CLEAN = """\
========= COMPUTE-SANITIZER
============================= test session starts ==============================
tests/gpu/test_small_suite.py ...                                        [100%]
============================== 3 passed in 60.05s ==============================
========= ERROR SUMMARY: 0 errors
"""
RACE = """\
========= Error: Race reported between Write access at 0x10 and Read access at 0x20
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_a_clean_run() -> None:
    """CHECKLIST 15."""
    assert sanitize.findings(CLEAN) == 0
    assert sanitize.tests_passed(CLEAN) == 3


def test_findings_are_counted() -> None:
    """CHECKLIST 15: of every process that the tool watched."""
    assert sanitize.findings(CLEAN.replace("SUMMARY: 0", "SUMMARY: 7")) == 7
    assert sanitize.findings(CLEAN + "========= ERROR SUMMARY: 1 error\n") == 1
    assert sanitize.findings(RACE) == 2


def test_of_initcheck_only_our_kernels_count() -> None:
    """CHECKLIST 15."""
    other = (
        "========= Uninitialized __global__ memory read\n=========     at gemm_of_others()+0x1\n"
    )
    ours = "========= Uninitialized __global__ memory read\n=========     at liquidgemm::k()+0x1\n"
    summary = "========= ERROR SUMMARY: 2 errors\n"
    assert sanitize.findings(other + other + summary, "initcheck") == 0
    assert sanitize.findings(other + ours + summary, "initcheck") == 1
    assert sanitize.findings(other + ours + summary, "memcheck") == 2
    with pytest.raises(ValueError, match="does not say where"):
        sanitize.findings(summary, "initcheck")


@pytest.mark.parametrize(
    "report",
    [
        "",
        "3 passed in 60.05s\n",
        "========= COMPUTE-SANITIZER\n",
        "========= Error: No attachable process found. compute-sanitizer timed-out.\n",
        "========= Error: Target application terminated before first instrumented API call\n"
        "========= ERROR SUMMARY: 0 errors\n",
        "========= Device not supported. Please refer to the documentation\n"
        "========= ERROR SUMMARY: 0 errors\n",
    ],
)
def test_a_tool_that_did_not_run(report: str) -> None:
    """CHECKLIST 15."""
    with pytest.raises(ValueError, match="did not run"):
        sanitize.findings(report)


@pytest.mark.parametrize(
    ("line", "passed"),
    [
        ("=== 3 passed in 6.05s ===", 3),
        ("3 passed, 2 warnings in 6.05s", 3),
        ("=== 3 passed, 2 skipped in 6.05s ===", 0),
        ("=== 1 failed, 2 passed in 6.05s ===", 0),
        ("=== 3 skipped in 6.05s ===", 0),
        ("no tests ran in 0.01s", 0),
    ],
)
def test_tests_that_did_not_run(line: str, passed: int) -> None:
    """CHECKLIST 15: skipped and failed tests show nothing."""
    assert sanitize.tests_passed(f"tests/gpu/test_small_suite.py\n{line}\n") == passed


def test_without_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """CHECKLIST 15."""
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="compute-sanitizer is not on PATH"):
        sanitize.sanitize("memcheck", None, [])


def test_what_is_watched() -> None:
    """CHECKLIST 15: the whole small suite; by racecheck two kernels, in tests that are there."""
    assert sanitize.watched_by("memcheck") == [sanitize.SMALL]
    command = sanitize.command_of("racecheck", "tool", None, sanitize.watched_by("racecheck"))
    filters = [after for word, after in pairwise(command) if word == "--kernel-name"]
    assert filters == ["kns=gemm_kernel", "kns=decode_kernel"]
    sources = "".join(path.read_text() for path in (sanitize.ROOT / "csrc").rglob("*.hpp"))
    assert all(f" {kernel}(" in sources for kernel in sanitize.RACING)
    words = sanitize.SMALLEST[2].split(" or ")
    names = re.findall(
        r"^def (test_\w+)", (sanitize.ROOT / sanitize.SMALL).read_text(), re.MULTILINE
    )
    assert all(any(word in name for name in names) for word in words)
