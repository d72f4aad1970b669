"""The benchmark of CPU time per call, on a GPU that is only pretended."""

import statistics
import time

import pytest
import torch

from bench.suites import host_cost


def test_candidates_take_turns_and_the_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    calls = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    times = host_cost.measure(calls, count=3, rounds=2, mode=torch.no_grad)
    measured = events[events.index("wait") :]  # what comes before is the warm-up
    assert measured == ["wait", *"aaa", "wait", *"bbb"] * 2 + ["wait"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_times_are_per_call_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter(range(0, 10**9, 6000))  # 6 µs between two looks
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    times = host_cost.measure({"a": lambda: None}, count=3, rounds=4, mode=torch.no_grad)
    assert statistics.median(times["a"]) == 2.0


def test_calls_run_in_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, enabled in (("grad", True), ("no_grad", False), ("inference_mode", False)):
        seen: set[bool] = set()
        call = {"a": lambda seen=seen: seen.add(torch.is_grad_enabled())}
        host_cost.measure(call, count=1, rounds=1, mode=host_cost.MODES[name])
        assert seen == {enabled}


@pytest.mark.parametrize("words", [["--calls", "0"], ["--calls", "400"], ["--rounds", "0"]])
def test_more_calls_than_the_queue_takes_are_refused(words, capsys) -> None:
    """The time would be the GPU's."""
    with pytest.raises(SystemExit):
        host_cost.main(words)
    assert f"{words[0]}: expected 1" in capsys.readouterr().err
