"""The benchmark of fused producers: what it runs and compares, on a CPU, and what it refuses."""

import pytest
import torch

import liquidgemm
from bench.suites import producers


def small_weights(n: int, k: int) -> list[torch.Tensor]:
    groups = -(-k // 64)
    qweight = torch.randint(0, 256, (n, groups * 32)).byte()
    qscale = torch.randint(1, 18, (n, groups)).byte()
    packed = liquidgemm.pack_weight(qweight, qscale, torch.zeros_like(qscale))
    return [packed, packed.clone()]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, producers.Layer]:
    monkeypatch.setattr(producers, "DEVICE", "cpu")
    monkeypatch.setattr(producers, "MODELS", {"tiny": (64, 128, 192)})
    monkeypatch.setattr(producers, "random_weights", small_weights)
    sizes = {"qkv": (192, 64), "gate_up": (256, 64), "down": (64, 128)}
    return {name: producers.Layer(*size) for name, size in sizes.items()}


def test_every_candidate_computes_its_site(layers) -> None:
    for site, (count, calls) in producers.sites("tiny", 3, layers).items():
        assert count == (2 if site == "mlp" else 1)
        assert list(calls) == ["gemm", "fused", "linear", "separate"]
        shapes = {call().shape for of_way in calls.values() for call in of_way}
        assert shapes == {(3, 192 if site == "norm" else 64)}


def test_a_wrong_producer_is_noticed(layers, monkeypatch: pytest.MonkeyPatch) -> None:
    producers.check("tiny", 3, layers)
    right = liquidgemm.glu_quantize

    def wrong(*args, **kwargs):
        tokens, y = right(*args, **kwargs)
        return tokens._replace(x8=tokens.x8.roll(1, -1)), y

    monkeypatch.setattr(liquidgemm, "glu_quantize", wrong)
    with pytest.raises(AssertionError, match="down behind the glu"):
        producers.check("tiny", 3, layers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt2"], "'gpt2' is none of llama3-8b, llama2-70b"),
        (["--m", "5000"], "--m: expected at most 4096 tokens, got 5000"),
        (["--seconds", "0"], "--seconds: expected a positive number"),
    ],
)
def test_arguments_that_are_refused(words, message, capsys) -> None:
    with pytest.raises(SystemExit):
        producers.main(words)
    assert message in capsys.readouterr().err
