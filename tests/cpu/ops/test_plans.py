"""What `explain_plan` says of the choice of plans, as numbers and as text."""

import re

import pytest
from repository import ROOT

import liquidgemm
from liquidgemm.ops.plans import explain_plan, plan_names

PROBLEMS = [(1, 4096, 4096), (16, 10240, 8192), (64, 1024, 1024), (300, 4096, 14336), (8, 64, 64)]


@pytest.mark.parametrize("op", ["gemm", "linear"])
@pytest.mark.parametrize("sizes", PROBLEMS, ids=str)
def test_every_plan_has_its_reason(sizes: tuple[int, int, int], op: str) -> None:
    found = explain_plan(*sizes, op=op)
    assert sorted(c.plan for c in found.candidates) == sorted(plan_names())
    assert found.selected.plan == found.plan
    assert found.selected.why_not == ""
    assert all(c.why_not for c in found.candidates[1:])
    scored = [c for c in found.candidates if c.us is not None]
    assert list(found.candidates[: len(scored)]) == sorted(scored, key=lambda c: c.us)
    for c in scored:
        soft = (c.memory_us**6 + c.sm_us**6) ** (1 / 6)
        assert c.us == pytest.approx(soft + c.fixed_us + c.behind_quantizer_us, rel=1e-4)
        assert c.memory_us == found.selected.memory_us  # all stream the same weights
    for c in found.candidates[len(scored) :]:
        assert (c.memory_us, c.sm_us, c.fixed_us, c.behind_quantizer_us) == (None,) * 4


@pytest.mark.parametrize("sizes", PROBLEMS, ids=str)
def test_reasons_name_what_is_worse(sizes: tuple[int, int, int]) -> None:
    """The term that a reason quotes is the one that exceeds the selected plan's most."""
    found = explain_plan(*sizes, op="linear")
    best = found.selected
    terms = {
        "busiest SM": "sm_us",
        "last round": "fixed_us",
        "behind a quantizer": "behind_quantizer_us",
    }
    for c in found.candidates[1:]:
        if c.us is None:
            continue
        excess = {name: getattr(c, name) - getattr(best, name) for name in terms.values()}
        (told,) = (name for words, name in terms.items() if words in c.why_not)
        assert excess[told] == max(excess.values()) > 0
        assert f"{getattr(c, told):.2f}" in c.why_not
        assert f"{getattr(best, told):.2f}" in c.why_not


def test_text_shows_the_choice() -> None:
    found = liquidgemm.explain_plan(16, 4096, 4096)
    text = str(found)
    assert text.startswith("gemm M=16 N=4096 K=4096 on 132 SMs, 3.35 TB/s: plan t16_")
    assert all(c.plan in text and c.why_not in text for c in found.candidates)
    assert "\n" not in found.summary()
    assert text.splitlines()[0] == found.summary()
    assert f"{found.whole_rounds} each" in text


def test_one_launch_or_two() -> None:
    assert explain_plan(1, 4096, 4096, op="linear").launches == 1
    sixteen = explain_plan(16, 4096, 4096, op="linear")
    assert sixteen.launches == 2
    assert "so many tokens" in sixteen.why_launches
    assert "two launches" in sixteen.summary()
    assert "cannot hold" in explain_plan(8, 4096, 14336, op="linear").why_launches
    assert "faster" in explain_plan(1, 6144, 4096, op="linear").why_launches


def test_behind_a_producer() -> None:
    """Another plan where its CTAs would find no room."""
    alone = explain_plan(64, 28672, 4096)
    behind = explain_plan(64, 28672, 4096, op="gemm_behind_producer")
    assert (alone.launches, behind.launches) == (1, 1)
    assert alone.selected.behind_quantizer_us == 0
    assert "before writes" in behind.why_launches
    linear = explain_plan(64, 28672, 4096, op="linear")
    assert (behind.plan, behind.eighths_ahead) == (linear.plan, linear.eighths_ahead)


def test_the_gpu_matters() -> None:
    full, few = explain_plan(64, 8192, 8192), explain_plan(64, 8192, 8192, num_sms=16)
    assert few.workers <= 16 < full.workers
    assert few.selected.sm_us > full.selected.sm_us
    fast = explain_plan(1, 8192, 8192, memory_tbps=4.8)
    slow = explain_plan(1, 8192, 8192)
    assert fast.selected.memory_us == pytest.approx(slow.selected.memory_us * 3.35 / 4.8, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "conv"}, "op: expected "),
        ({"m": 0}, "m: expected 1 to"),
        ({"n": -1}, "n: expected 1 to"),
        ({"k": 2**31}, "k: expected 1 to"),
        ({"num_sms": 0}, "num_sms: expected 1 to"),
        ({"memory_tbps": 0.0}, "memory_tbps: expected a positive number"),
        ({"memory_tbps": float("nan")}, "memory_tbps: expected a positive number"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain_plan(**{"m": 1, "n": 64, "k": 64, **change})


def test_every_rule_names_its_experiment() -> None:
    """Each is a heading of docs/experiments; a rule without one says that it is none."""
    rules = (ROOT / "csrc/liquidgemm/plan/rules.hpp").read_text()
    named = re.findall(r"(\w+\.md), \"([^\"]+)\"", rules.replace("\n//", ""))
    assert len(named) >= 8
    for file, heading in named:
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/experiments" / file).read_text(), re.M)
        assert heading in headings, f"{file} has no heading {heading!r}"
    for comment, name in re.findall(r"((?:^//.*\n)+)inline (?:bool|double) (\w+)\(", rules, re.M):
        assert "Experiment" in comment or comment.startswith("// No rule but"), name
