"""Runs Python code in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import liquidgemm

PACKAGE_ROOT = Path(liquidgemm.__file__).parent.parent


def run_python(
    code: str, *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same package, and may end with an error.

    Raises:
        subprocess.TimeoutExpired: it hangs, and has been killed.
    """
    path = os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
