"""`vllm serve DIR` on a CPU, and what `serve_check.py` asks of it on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import liquidgemm

pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")
pytest.importorskip("uvicorn", reason="what vLLM's server needs is not installed: make test-serve")

CHECK = Path(__file__).with_name("serve_check.py")


@pytest.mark.timeout(1200)
def test_a_folder_is_served_as_it_is():
    """By HTTP near transformers, and the text of an engine in a program."""
    root = str(Path(liquidgemm.__file__).parents[1])
    command = [sys.executable, str(CHECK), "endpoint", "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--budget", "900"],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ok: offline it is the same text" in done.stdout
