"""compute-sanitizer over the small suite: `tests/support/sanitize.py [--package FOLDER] TOOL`.

Fails if the tool finds something, and if it did not really run: if it is not installed, says
nothing, attached to no process, or the tests it was to watch were skipped.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
SMALL = "tests/gpu/test_small_suite.py"
# racecheck's: the kernels that hand on data in shared memory by barriers of their own, and of the
# small suite what takes no minutes.
RACING = ("gemm_kernel", "decode_kernel")
SMALLEST = (SMALL, "-k", "epilogues or kv")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
PLACE = re.compile(r"^=========\s+at (.+)$", re.MULTILINE)
DID_NOT_RUN = (
    "No attachable process found",
    "terminated before first instrumented API call",
    "Device not supported",
    "Error: ",
    "Internal Sanitizer Error",
)


def findings(report: str, tool: str = "memcheck") -> int:
    """Number of errors or hazards in the output of compute-sanitizer.

    Of initcheck's, those in our kernels: matrix products of other libraries, which the tests
    compare with, are seen to read workspaces that nobody has written.

    Raises:
        ValueError: the tool did not do its work; the message says how that is known.
    """
    counts = [int(a or b) for a, b in SUMMARY.findall(report)]
    if not sum(counts):
        for line in report.splitlines():
            if line.startswith("=========") and any(sign in line for sign in DID_NOT_RUN):
                raise ValueError(f"compute-sanitizer did not run: {line.lstrip('= ')}")
    if not counts:
        raise ValueError("compute-sanitizer did not run: its summary is missing")
    if tool == "initcheck" and sum(counts):
        places = PLACE.findall(report)
        if not places:
            raise ValueError("compute-sanitizer does not say where it found something")
        return sum("liquidgemm" in place for place in places)
    return sum(counts)


def tests_passed(output: str) -> int:
    """Tests that ran to their end and passed, by pytest's last line; 0 if any did not."""
    ended = re.findall(r"^=* ?(?:(\d+) failed)?.*?(\d+) passed(.*)$", output, re.MULTILINE)
    if not ended or ended[-1][0] or "skipped" in ended[-1][2]:
        return 0
    return int(ended[-1][1])


def watched_by(tool: str) -> list[str]:
    """What the tool watches if nothing else is said, as arguments of pytest."""
    return list(SMALLEST) if tool == "racecheck" else [SMALL]


def command_of(tool: str, executable: str, package: Path | None, tests: list[str]) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "1000"]
    if tool == "racecheck":  # the only one for which instrumenting torch's kernels takes minutes
        for kernel in RACING:
            options += ["--kernel-name", f"kns={kernel}"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *tests]
    if package is not None:
        # First and last: versions of pytest differ in which end of the list counts first.
        pytest += ["-o", f"pythonpath={package} tests/planted tests/gpu tests/support . {package}"]
    return [executable, *options, *pytest]


def sanitize(tool: str, package: Path | None, tests: list[str]) -> tuple[int, str]:
    """Findings of the tool over these tests, and all that was printed.

    Raises:
        ValueError: the tool or the tests did not run.
    """
    executable = shutil.which("compute-sanitizer")
    if executable is None:
        raise ValueError("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    # Without the caching allocator every tensor is an allocation of its own, with edges to overrun.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SANITIZING": "1"}
    run = subprocess.run(
        command_of(tool, executable, package, tests),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = findings(run.stdout, tool)
    if package is not None and str(package / "liquidgemm") not in run.stdout:
        raise ValueError(f"the library in use is not that of {package}")
    others = tool == "initcheck"  # findings of other libraries' kernels set the status, too
    if found == 0 and (tests_passed(run.stdout) == 0 or (run.returncode != 0 and not others)):
        raise ValueError(f"the tests did not pass (status {run.returncode}):\n{run.stdout[-3000:]}")
    return found, run.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--package", type=Path, help="folder of another build of the library")
    parser.add_argument("--expect-findings", action="store_true", help="for a planted bug")
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="arguments of pytest")
    arguments = parser.parse_args()
    package = arguments.package and arguments.package.resolve()
    try:
        found, output = sanitize(
            arguments.tool, package, arguments.tests or watched_by(arguments.tool)
        )
    except ValueError as error:
        print(f"{arguments.tool}: {error}")
        return 1
    if bool(found) != arguments.expect_findings:
        print(output[-6000:])
    print(f"{arguments.tool}: {found} findings, {tests_passed(output)} tests passed under it")
    return int(bool(found) != arguments.expect_findings)


if __name__ == "__main__":
    sys.exit(main())
