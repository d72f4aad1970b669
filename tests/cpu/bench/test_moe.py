"""Layers of experts in the benchmark: routings, floors, and tables from a record."""

import json

import pytest
import torch

from bench.core import experts
from bench.peers.experts import parse_names
from bench.report import moe


@pytest.mark.parametrize("kind", experts.ROUTINGS)
@pytest.mark.parametrize("layer", experts.LAYERS.values(), ids=lambda layer: layer.name)
def test_a_routing_is_one_of_distinct_experts(layer: experts.Layer, kind: str) -> None:
    for tokens in (1, 50):
        routing = experts.route(layer, tokens, kind, seed=3, device="cpu")
        assert routing.ids.shape == (tokens, layer.top_k)
        assert all(len(set(row)) == layer.top_k for row in routing.ids.tolist())
        local = routing.ids[routing.ids < layer.local_experts].tolist()
        assert list(routing.counts) == [local.count(e) for e in range(layer.local_experts)]
        assert routing.offsets.diff().tolist() == list(routing.counts)
        assert routing.rows == len(local) >= 1


def test_a_skewed_routing_is_less_even() -> None:
    layer = experts.LAYERS["qwen3-30b-a3b"]
    even, skewed = (
        max(experts.route(layer, 512, kind, 0, device="cpu").counts) for kind in experts.ROUTINGS
    )
    assert skewed > 2 * even


def test_floor_is_bytes_or_multiplications() -> None:
    layer = experts.Layer("any", hidden=128, inner=64, experts=4, top_k=1)
    routing = experts.Routing(torch.zeros(1), torch.zeros(1), (0, 3, 1, 0))
    blocks = (2 * 2) + (2 * 1)  # of both products
    expected = 2 * blocks * experts.BLOCK_BYTES / 1e6
    assert experts.floor_us(layer, routing, 1e6) == pytest.approx(expected)
    assert layer.expert_bytes() == blocks * experts.BLOCK_BYTES
    many = experts.Routing(torch.zeros(1), torch.zeros(1), (10**9, 0, 0, 0))
    operations = 2 * 10**9 * (128 * 128 + 128 * 64)
    assert experts.floor_us(layer, many, 1e6) == pytest.approx(operations / 1750e6)


def test_peers_are_named_or_refused() -> None:
    assert parse_names("fp8,humming") == ["fp8", "humming"]
    with pytest.raises(ValueError, match="'liquidgemm' is none of"):
        parse_names("liquidgemm")


def test_tables_and_plot_of_a_record(tmp_path) -> None:
    case = {"layer": "l", "routing": "uniform", "tokens": 8, "rows": 64.0, "active": 50.0}
    times = {moe.OURS: {"median_us": 20.0}, moe.LAYER: {"median_us": 30.0}, "fp8": {"median_us": 1}}
    plans = {"t8_p1_k4_s4": 4.0, "t16_p1_k4_s4": 3.0}
    chosen = "R = 64, E = 8, N = 9, K = 9 on 132 SMs: plan t8_p1_k4_s4, 132 workers"
    record = {
        "machine": {"gpu": "a GPU"},
        "started": "now",
        "commit": "c",
        "command": "bench",
        "stream_bytes_per_us": 3e6,
        "absent": {"humming, l": "not installed"},
        "cases": [
            case | {"floor_us": 10.0, "times": times},
            case | {"routing": "skewed", "floor_us": 9.0, "times": {moe.OURS: {"median_us": 25.0}}},
        ],
        "sweep": [case | {"n": 9, "k": 9, "times": plans, "chosen": chosen}],
    }
    file = tmp_path / "moe.json"
    file.write_text(json.dumps(record))
    assert moe.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert "| 8 | 64 / 50.0 | 10.0 | 20.0 | 2.00 | 30.0 | 1.0 |" in text
    assert "| 8 | 9 x 9 | t16_p1_k4_s4 | 3.0 | t8_p1_k4_s4 | 1.33 |" in text
    assert "| l | 8 | 1.25 | - | 0.90 |" in text
    assert "not installed" in text
