"""The installed vLLM has every name that the plug-in uses, and one that has not is found."""

from importlib.util import find_spec
from pathlib import Path

import drift
import pytest

SPEC = find_spec("vllm")
if SPEC is None or SPEC.origin is None:
    pytest.skip("vLLM is not installed: make test-serve", allow_module_level=True)
TREE = drift.Tree(Path(SPEC.origin).parents[1])


def test_every_name_is_there():
    report = drift.check(TREE)
    assert report.missing == []
    assert report.signatures["LinearMethodBase.apply"] == "self, layer, x, bias"


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from vllm.platforms import no_platform", ["vllm.platforms.no_platform"]),
        ("from vllm.no_module import name", ["vllm.no_module.name"]),
        ("from vllm.platforms import current_platform", []),
        (
            "class Method(LinearMethodBase):\n  def apply(self, layer, x): pass",
            ["planted.py: Method.apply lacks bias of vLLM's"],
        ),
        (
            "try:\n  from vllm.platforms import no_platform\nexcept ImportError:\n  pass",
            [],
        ),
    ],
)
def test_what_is_missing_is_named(source, missing, tmp_path):
    (tmp_path / "planted.py").write_text(source)
    assert drift.check(TREE, tmp_path).missing == missing


@pytest.mark.parametrize("member", ["no_such_method", "apply"])
def test_members_of_classes_are_looked_up(member, monkeypatch):
    used = ("vllm.model_executor.layers.linear", "LinearMethodBase")
    monkeypatch.setitem(drift.USED, used, member)
    found = [name for name in drift.check(TREE).missing if member in name]
    assert len(found) == (member == "no_such_method")


def test_marks_and_arguments_are_looked_up(monkeypatch):
    monkeypatch.setattr(drift, "MARKS", {"vllm.platforms": "no such text"})
    monkeypatch.setattr(drift, "GIVEN", {"PyNcclCommunicator.all_reduce": "no_argument"})
    missing = drift.check(TREE).missing
    assert "vllm.platforms: no such text" in missing
    assert "PyNcclCommunicator.all_reduce(no_argument)" in missing
