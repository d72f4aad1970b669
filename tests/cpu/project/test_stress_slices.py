"""SLICE=i/n cuts tests/stress into parts that together are the whole."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from repository import TESTS

FILE = TESTS / "stress/conftest.py"


@pytest.fixture
def stress():
    spec = importlib.util.spec_from_file_location("stress_conftest", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Item:
    def __init__(self, path: str) -> None:
        self.path, self.markers = Path(path), []

    def add_marker(self, marker) -> None:
        self.markers.append(marker)


def test_slices_are_a_partition(stress, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    everything = [Item(f"tests/stress/test_{i}.py") for i in range(10)]
    other = Item("tests/test_other.py")
    seen = []
    for index in range(1, 4):
        monkeypatch.setenv("SLICE", f"{index}/3")
        items = [*everything, other]
        stress.pytest_collection_modifyitems(config, items)
        assert items.pop() is other
        seen += items
    assert sorted(map(id, seen)) == sorted(map(id, everything))
    assert all(item.markers for item in everything)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/3/5", ""])
def test_bad_slices_are_refused(stress, text: str) -> None:
    with pytest.raises(ValueError, match="SLICE: expected i/n"):
        stress.slice_of(text)
