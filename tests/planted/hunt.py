"""Runs the suite against the planted bugs: `python tests/planted/hunt.py [--build] [name ...]`.

Prints, for every bug, what caught it. Before that the same tests have to pass on a library that
was built in the same way without a bug. Ends with status 1 if a bug was not caught.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bugs import BUGS, BUILD, DELAY, Bug
from variants import FOLDER, NONE, REFUSED, ROOT, build_variants, slug

WATCHDOG = 90  # seconds for one run of pytest: without a bug it takes 10 to 30
AT_ONCE = 6

# What has to pass in spite of random delays: everything that looks at the results of the kernel.
EXACTNESS = (
    "tests/gpu/test_gemm.py",
    "tests/gpu/test_graphs.py -k 'replay or back_to_back'",
    "tests/gpu/test_overtaking.py",
    "tests/gpu/test_streams.py tests/gpu/test_few_sms.py -k 'not green'",
    "tests/gpu/test_canaries.py tests/gpu/test_decode.py",
    "tests/gpu/test_fuzz.py tests/gpu/test_quantize_activation.py",
    "tests/gpu/test_quantizing_gemm.py -k 'not where_it_pays'",
)


@dataclass(frozen=True)
class Outcome:
    """How a selection of tests ended: "passed", "failed", "hung" or "did not run"."""

    selection: str
    verdict: str
    detail: str

    @property
    def caught(self) -> bool:
        return self.verdict in ("failed", "hung")


def run_tests(package: Path, selection: str, seconds: float = WATCHDOG) -> Outcome:
    """Runs pytest with this build of the library, in a process that ends after so many seconds."""
    # First and last: versions of pytest differ in which end of the list counts first.
    place = package.relative_to(ROOT)
    paths = f"pythonpath={place} tests/planted tests/gpu tests/support . {place}"
    command = [sys.executable, "-m", "pytest", "-x", "--tb=line", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, "-o", paths, *shlex.split(selection)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(selection, "hung", f"ended after {seconds} s")
    (FOLDER / "logs").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", f"{package.name} {selection}")
    (FOLDER / f"logs/{name}.log").write_text(output)
    if str(package / "liquidgemm") not in output:
        return Outcome(selection, "did not run", "the library in use is another one")
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    if process.returncode == 0 and re.search(r"\d+ passed", lines[-1]):
        return Outcome(selection, "passed", lines[-1].strip("= "))
    failures = [line for line in lines if re.match(r"FAILED|ERROR|E  |/.*Error", line)]
    if process.returncode == 1 and "Timeout" in output and not failures:
        return Outcome(selection, "hung", "ended by the test's own time limit")
    if process.returncode == 1 or process.returncode < 0:
        return Outcome(selection, "failed", (failures or lines)[-1][:160])
    return Outcome(selection, "did not run", f"pytest ended with {process.returncode}: {lines[-1]}")


def catch(bug: Bug) -> Outcome:
    """The first outcome that catches the bug, or else the last."""
    package = FOLDER / slug(bug)
    if (refusal := package / REFUSED).exists():
        verdict = "failed" if BUILD in bug.caught_by else "did not run"
        return Outcome(BUILD, verdict, refusal.read_text().splitlines()[-1].strip()[:160])
    if not package.exists():
        return Outcome(BUILD, "did not run", f"{package} is not built")
    outcome = Outcome("nothing", "did not run", "no test is named")
    for selection in bug.caught_by:
        if selection == BUILD:
            continue
        outcome = run_tests(package, selection)
        if outcome.caught:
            break
    return outcome


def control(bugs: list[Bug]) -> list[Outcome]:
    """What the tests that are to catch these bugs say where there is none."""
    selections = sorted({s for bug in bugs for s in bug.caught_by if s != BUILD})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda s: run_tests(FOLDER / slug(NONE), s), selections))


def survive_delays() -> list[Outcome]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda s: run_tests(FOLDER / slug(DELAY), s, 3 * WATCHDOG), EXACTNESS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="substrings of names; all bugs by default")
    parser.add_argument("--build", action="store_true", help="bring the builds up to date first")
    parser.add_argument("--delays", action="store_true", help="run the delay build, and no bugs")
    arguments = parser.parse_args()
    names = arguments.names or [""]
    bugs = [bug for bug in BUGS if any(name in bug.name for name in names)]
    if arguments.build:
        build_variants([DELAY] if arguments.delays else [NONE, *bugs])
    bad = 0
    outcomes = survive_delays() if arguments.delays else control(bugs)
    for outcome in outcomes:
        bad += outcome.verdict != "passed"
        kind = "delays" if arguments.delays else "no bug"
        print(f"{kind}: {outcome.selection}: {outcome.verdict}: {outcome.detail}", flush=True)
    if arguments.delays:
        return int(bad > 0)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for bug, outcome in zip(bugs, pool.map(catch, bugs), strict=True):
            bad += not outcome.caught
            mark = "caught" if outcome.caught else "NOT CAUGHT"
            how = f"{outcome.selection}: {outcome.verdict}: {outcome.detail}"
            print(f"{mark}: {bug.name}: {how}", flush=True)
    print(f"planted bugs: {len(bugs)}, not as expected: {bad}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
