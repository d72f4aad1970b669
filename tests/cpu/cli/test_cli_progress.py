"""What goes on is shown on a terminal, on the standard error; nothing of it without one."""

import cli_runs
import pytest
from cli_runs import folder_fixture, original_fixture  # noqa: F401

STEPS = {
    "quantize": (
        [*cli_runs.CALIBRATE, "a.txt", "--tokens", "64"],
        ("loading model", "reading the texts", "calibrating", "writing out"),
    ),
    "eval": (
        [
            *cli_runs.EVAL,
            *("--reference", "model"),
            *("--tokens", "64", "--length", "16", "--stride", "8"),
        ],
        ("loading model", "reading the text", "evaluating"),
    ),
}
BARS = ("calibrating", "evaluating")


@pytest.mark.parametrize("command", STEPS)
@pytest.mark.parametrize("on_terminal", [True, False])
def test_steps_are_shown(
    command: str, on_terminal: bool, folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if on_terminal else "0")
    arguments, steps = STEPS[command]
    result = cli_runs.run(*arguments)
    assert result.exit_code == 0, result.output
    for step in steps:
        assert (step in result.stderr) == (on_terminal or step in BARS), step
        assert step not in result.stdout or step == "writing out"
