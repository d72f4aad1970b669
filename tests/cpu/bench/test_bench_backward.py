"""The benchmark of the backward pass: what it runs and compares, on a CPU, and what it refuses."""

import pytest
import torch

import liquidgemm
from bench.suites import backward


def small_weights(n: int, k: int) -> list[torch.Tensor]:
    groups = -(-k // 64)
    qweight = torch.randint(0, 256, (n, groups * 32)).byte()
    qscale = torch.randint(1, 18, (n, groups)).byte()
    packed = liquidgemm.pack_weight(qweight, qscale, torch.zeros_like(qscale))
    return [packed, packed.clone()]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> backward.Layer:
    monkeypatch.setattr(backward, "DEVICE", "cpu")
    monkeypatch.setattr(backward, "random_weights", small_weights)
    return backward.Layer(72, 100, 5)


def test_every_candidate_is_a_gradient(layer) -> None:
    shapes = {name: {call().shape for call in calls} for name, calls in layer.calls().items()}
    expanded = shapes.pop("expand")
    assert expanded == {(72, 100)}
    assert list(shapes) == ["bf16", "ours", "composite"]
    assert set.union(*shapes.values()) == {(5, 100)}


def test_a_wrong_gradient_is_noticed(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    layer.check()
    monkeypatch.setattr(layer, "ours", lambda i: layer.bf16(i).roll(1, -1))
    with pytest.raises(AssertionError, match="not the composite's"):
        layer.check()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "1x1"], "'1x1' is none of 4096x4096"),
        (["--seconds", "0"], "--seconds: expected a positive number"),
    ],
)
def test_arguments_that_are_refused(words, message, capsys) -> None:
    with pytest.raises(SystemExit):
        backward.main(words)
    assert message in capsys.readouterr().err
