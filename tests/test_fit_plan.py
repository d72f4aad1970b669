"""The fit of the heuristic: it recovers the constants of a model that predicts the data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
from bench import fit_plan

PLAN_HPP = Path(__file__).parent.parent / "csrc/liquidgemm/host/plan.hpp"
TRUE = np.log([1.0, 0.9, 0.9, 2.0, 0.3, 0.05, 0.2, 0.8, 2.5, 0.5, 3.0, 0.7, 3.5])


def synthetic_sweep(path: Path) -> fit_plan.Sweep:
    """Two tiles, three splits, sizes on both sides of the crossover; times from TRUE itself."""
    rows = [
        {"n": n, "k": k, "m": m, "tile": tile, "split_k": split_k, "us": 1.0}
        for n in (1024, 4096, 10240)
        for k in (1024, 8192)
        for m in (1, 8, 64, 512)
        for tile in ("t8_p1_k4_s4", "t128_p2_k1_s2")
        for split_k in (1, 2, 4)
    ]
    data = {"gpu": "none", "sms": 132, "memory_bytes_per_us": 3.35e6, "rows": rows}
    path.write_text(json.dumps(data))
    for row, us in zip(rows, fit_plan.predict(fit_plan.Sweep.load(path), TRUE), strict=True):
        row["us"] = us
    path.write_text(json.dumps(data))
    return fit_plan.Sweep.load(path)


def test_fit_recovers_the_constants(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path / "sweep.json")
    predicted = fit_plan.predict(sweep, fit_plan.fit(sweep))
    np.testing.assert_allclose(predicted, sweep.us, rtol=0.02)


def test_formula_is_the_library_s() -> None:
    """`estimate` in plan.hpp and `predict` agree, with the constants that plan.hpp holds."""
    import torch

    import liquidgemm  # noqa: F401

    source = PLAN_HPP.read_text()

    def constant(name: str) -> float:
        match = re.search(rf"{name} = ([0-9.e]+);", source)
        assert match, name
        return float(match[1])

    number = r"([\d.]+)"
    costs = re.findall(
        rf"\{{{number}, {number}, \{{{number}, {number}\}}\}},\s+// (t\d+_p\d+_k\d+)", source
    )
    names = ["launch_us", "occupancy_us", "memory_efficiency", "sm_memory_share", "m_tiles_share"]
    by_kind = np.array([cost[:4] for cost in costs], dtype=float).T.ravel()
    parameters = np.log([*map(constant, names), *by_kind])
    tiles = torch.ops.liquidgemm_testing.config_names()
    assert [tile.rsplit("_", 1)[0] for tile in tiles] == [cost[4] for cost in costs]

    for m, n, k in [(1, 4096, 4096), (16, 10240, 8192), (64, 1024, 8192), (4096, 6144, 4096)]:
        text = torch.ops.liquidgemm_testing.select_config(m, n, k, 132, 4.9)
        match = re.search(r"tile (\w+), split_k (\d+); estimated ([\d.]+) us", text)
        assert match, text
        shape = [float(v) for v in re.findall(r"\d+", match[1])]
        one = [np.array([v], dtype=float) for v in (n, k, m, shape[0], shape[1], shape[3])]
        sweep = fit_plan.Sweep(
            *one,
            np.array([float(match[2])]),
            np.array([tiles.index(match[1])]),
            np.array([1.0]),
            tiles,
            132,
            4.9e6,
        )
        assert fit_plan.predict(sweep, parameters)[0] == pytest.approx(float(match[3]), abs=0.06)
