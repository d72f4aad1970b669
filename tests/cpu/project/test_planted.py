"""The planted bugs of tests/planted still fit the sources. What catches them needs a GPU."""

import re
import shlex
import shutil
from pathlib import Path

import hunt
import pytest
import variants
from bugs import BUGS, BUILD, DELAY, Bug
from repository import ROOT

import setup as build


@pytest.fixture(scope="module")
def reduced() -> dict[str, str]:
    return variants.reduced_sources(ROOT)


@pytest.mark.parametrize("bug", variants.VARIANTS, ids=lambda bug: bug.name)
def test_every_patch_applies(bug: Bug, reduced: dict[str, str]) -> None:
    """CHECKLIST 16: a change of csrc/ that a patch does not survive has to mend the patch."""
    patched = variants.patched_sources(ROOT, bug)
    assert {file for file, text in patched.items() if text != reduced[file]} == bug.files


def chosen_by(selection: str) -> list[str]:
    """Names of the tests that pytest would choose; that alone, as to collect them takes a GPU."""
    file, *option = shlex.split(selection)
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    if not option:
        return names
    assert option[0] == "-k", selection
    return [name for name in names if any(word in name for word in option[1].split(" or "))]


def test_the_list_of_bugs() -> None:
    """CHECKLIST 6, 13, 15: each has tests that are there, and a folder of its own."""
    assert len({variants.slug(bug) for bug in variants.VARIANTS}) == len(variants.VARIANTS)
    for bug in BUGS:
        assert bug.caught_by, bug.name
        for selection in set(bug.caught_by) - {BUILD}:
            assert chosen_by(selection), f"{bug.name}: no test is chosen by {selection}"
    assert {"memcheck", "racecheck"} <= {bug.tool for bug in BUGS}
    assert not DELAY.caught_by


def test_a_patch_that_does_not_apply_is_named() -> None:
    lost = Bug("lost", (variants.BUGS[0].patches[0],), ())
    with pytest.raises(LookupError, match=r"lost: .*consumer.hpp no longer holds"):
        lost.apply("something else", lost.patches[0].file)


@pytest.mark.parametrize(
    ("package", "selection", "seconds", "verdict"),
    [
        (ROOT, "tests/cpu/project/test_sanitize.py", 120, "passed"),
        (ROOT, "tests/cpu/project/test_sanitize.py -k there_is_no_such_test", 120, "did not run"),
        (ROOT / "build/not_there", "tests/cpu/project/test_sanitize.py", 120, "did not run"),
        (ROOT, "tests/cpu/project/test_sanitize.py", 0.3, "hung"),
    ],
    ids=["passed", "no tests", "another library", "hung"],
)
def test_the_hunter_tells_outcomes_apart(package, selection, seconds, verdict) -> None:
    """CHECKLIST 14: a run that hangs is ended; one in which nothing was tested catches nothing."""
    outcome = hunt.run_tests(package, selection, seconds)
    assert outcome.verdict == verdict, outcome
    assert outcome.caught == (verdict == "hung")


def test_the_reduced_sources_compile(reduced: dict[str, str], tmp_path: Path) -> None:
    """The host side, which has no kernels, with the cut-down list of tiles."""
    variants.write_tree(tmp_path, reduced)
    shutil.copy(ROOT / "tests/cpp/test_plan.cpp", tmp_path)
    tools = build.Toolchain.find()
    includes = [
        flag.replace(str(ROOT / "csrc"), str(tmp_path / "csrc")) for flag in tools.includes(ROOT)
    ]
    compiled = build.run_quietly(
        tools.cxx, "-std=c++20", "-fsyntax-only", *includes, tmp_path / "test_plan.cpp"
    )
    assert compiled.returncode == 0, compiled.stderr
    instantiated = [Path(file).stem for file in reduced if "instantiations" in file]
    tiles = [tile for _, _, kept in variants.LISTS.values() for tile in kept]
    assert sorted(instantiated) == sorted(tiles)
