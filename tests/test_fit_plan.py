"""The fit of the heuristic: it recovers the constants of a model that predicts the data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
from bench.core import machine
from bench.plan import fit
from bench.plan import sweep as plan_sweep

PLAN_HPP = Path(__file__).parent.parent / "csrc/liquidgemm/plan/plan.hpp"
PLANS = [
    *("t8_p1_k2_s4_half", "t8_p1_k2_s4_half_split2", "t8_p1_k2_s4_half_split4"),
    *("t8_p1_k4_s4", "t8_p1_k4_s4_split2", "t8_p1_k4_s4_split4"),
    *("t128_p2_k1_s2", "t128_p2_k1_s2_pairs"),
]
PAIR_GAIN = 0.97
OF_TILES = ([0.06, 0.05, 0.2], [0.6, 0.8, 2.5], [0.4, 0.5, 3.0], [0.5, 0.7, 3.5])
TRUE = np.log([1.0, 0.9, 0.5, 0.9, 0.3, *np.ravel(OF_TILES)])


def synthetic_sweep(path: Path) -> fit.Sweep:
    """Three tiles and their plans, sizes on both sides of the crossover; times from TRUE itself."""
    rows = [
        {"n": n, "k": k, "m": m, "plan": plan, "us": 1.0}
        for n in (1024, 4096, 10240)
        for k in (1024, 8192)
        for m in (1, 8, 64, 512, 4096)
        for plan in PLANS
    ]
    data = {"gpu": "none", "sms": 132, "memory_bytes_per_us": 3.35e6, "rows": rows}
    path.write_text(json.dumps(data))
    times = fit.predict(fit.Sweep.load(path), TRUE, PAIR_GAIN)
    for row, us in zip(rows, times, strict=True):
        row["us"] = us
    path.write_text(json.dumps(data))
    return fit.Sweep.load(path)


def test_fit_recovers_the_constants(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path / "sweep.json")
    assert sweep.pair_gain() == pytest.approx(PAIR_GAIN, abs=0.01)
    predicted = fit.predict(sweep, fit.fit(sweep, PAIR_GAIN), PAIR_GAIN)
    np.testing.assert_allclose(predicted, sweep.us, rtol=0.02)


def test_formula_is_the_library_s() -> None:
    """`estimate` in plan.hpp and `predict` agree, with the constants that plan.hpp holds."""
    source = PLAN_HPP.read_text()

    def constant(name: str) -> float:
        match = re.search(rf"{name} = ([0-9.e]+);", source)
        assert match, name
        return float(match[1])

    assert constant("half_sm_bytes") == fit.HALF_SM_BYTES
    number = r"([\d.]+)"
    costs = re.findall(
        rf"\{{[\d, ]+\}}, {number}, {number}, \{{{number}, {number}\}}\}},\s+"
        r"// (t\d+_p\d+_k\d+_s\d+\S*)",
        source,
    )
    tiles = [cost[4] for cost in costs]
    plans = torch.ops.liquidgemm_testing.config_names()
    assert tiles == list(dict.fromkeys(map(fit.tile_of, plans)))
    by_kind = np.array([cost[:4] for cost in costs], dtype=float).T.ravel()
    with np.errstate(divide="ignore"):  # what no plan of a tile has costs nothing
        parameters = np.log([*map(constant, fit.NAMES), *by_kind])

    chosen = set()
    for m, n, k in [
        *((1, 28672, 4096), (16, 10240, 8192), (64, 1024, 8192), (4096, 6144, 4096)),
        *((8, 2048, 2048), (32, 4096, 4096), (64, 6144, 4096), (1, 8192, 1024)),
        *((256, 4096, 4096), (1024, 10240, 8192), (100, 4096, 14336), (8192, 8192, 8192)),
    ]:
        text = torch.ops.liquidgemm_testing.select_config(m, n, k, 132, 3.35)
        match = re.search(r"plan (\w+); estimated ([\d.]+) us", text)
        assert match, text
        chosen.add(match[1])
        row = {"n": n, "k": k, "m": m, "plan": match[1], "us": 1.0}
        sweep = fit.Sweep.of([row], 132, 3.35e6)
        sweep.tile = np.array([tiles.index(sweep.names[0])])
        estimate = fit.predict(sweep, parameters, constant("pair_gain"))[0]
        assert estimate == pytest.approx(float(match[2]), abs=0.06), text
    assert {plan.rsplit("_", 1)[-1] for plan in chosen} >= {"pairs", "split4", "s2", "half"}
    assert {re.search(r"_k(\d)_", plan)[1] for plan in chosen} == {"1", "2", "3", "4"}


def test_an_updated_sweep_says_which_run_a_row_is_of():
    def row(m: int, plan: str, us: float) -> dict:
        return {"n": 64, "k": 64, "m": m, "plan": plan, "us": us}

    empty = {"gpu": "none", "runs": [], "rows": []}
    first = plan_sweep.merged(empty, {"commit": "a"}, [row(1, "t8", 3.0), row(1, "t16", 4.0)])
    second = plan_sweep.merged(first, {"commit": "b"}, [row(1, "t8", 2.0), row(8, "t8", 5.0)])
    assert second["gpu"] == "none"
    assert [run["commit"] for run in second["runs"]] == ["a", "b"]
    assert [(r["m"], r["plan"], r["us"], r["run"]) for r in second["rows"]] == [
        (1, "t16", 4.0, 0),
        (1, "t8", 2.0, 1),
        (8, "t8", 5.0, 1),
    ]
    third = plan_sweep.merged(second, {"commit": "c"}, [row(1, "t16", 1.0)])
    assert [run["commit"] for run in third["runs"]] == ["b", "c"]  # no row is left of a
    assert [(r["m"], r["plan"], r["run"]) for r in third["rows"]] == [
        (1, "t8", 0),
        (8, "t8", 0),
        (1, "t16", 1),
    ]


def test_the_published_sweep_has_a_run_for_every_row():
    sweep = json.loads((machine.ROOT / machine.newest_results(name="plan_sweep.json")).read_text())
    assert {row["run"] for row in sweep["rows"]} == set(range(len(sweep["runs"])))
    assert all(run["commit"] for run in sweep["runs"])
    swept = {(row["n"], row["k"]) for row in sweep["rows"]}
    assert swept == {(s.n, s.k) for shapes, _ in plan_sweep.SWEEPS for s in shapes}


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ((1, 4096, 4096), "one launch"),
        ((4, 10240, 8192), "one launch"),
        ((8, 28672, 4096), "one launch"),  # several tiles per CTA
        ((8, 4096, 14336), "two launches, t8_p1_k4_s4_split2"),  # room for eight quantizing CTAs
        ((64, 2048, 4096), "two launches, t64_p1_k3_s2_split2"),  # none beside twice as many CTAs
        ((8, 1024, 8192), "two launches, t8_p1_k4_s4_split4"),
        ((8, 8192, 1024), "one launch"),  # little to read
        ((8, 4096, 4096), "two launches, t8_p1_k4_s4"),  # gemm itself with CTAs of half an SM
        ((1, 6144, 4096), "two launches, t8_p1_k4_s4"),  # one tile per CTA, of a whole SM
        ((2, 8192, 28672), "two launches, t8_p1_k4_s4_split2"),  # more than a CTA's registers hold
        ((4, 57344, 8192), "two launches, t8_p1_k4_s4"),  # more than its shared memory holds
        ((1, 4096, 4100), "two launches, t8_p1_k4_s4"),  # no whole vectors
        ((16, 4096, 4096), "two launches, t16_p1_k4_s4"),
    ],
)
def test_tells_whether_linear_is_one_launch(sizes, launches):
    text = torch.ops.liquidgemm_testing.select_config(*sizes, 132)
    assert text.endswith(f"linear of 16-bit activations: {launches}"), text


def test_only_plausible_plans_are_swept_and_chosen():
    for m in (1, 16, 17, 64, 100, 128, 1000, 4096):
        plans = dict(plan_sweep.plausible_plans(m, ""))
        tokens = {int(re.match(r"t(\d+)_", name)[1]) for name in plans.values()}
        assert max(tokens) < (2 if m <= 16 else 4) * max(m, 8)
        assert min(tokens) >= min(m / 4, 128)
        text = torch.ops.liquidgemm_testing.select_config(m, 4096, 4096, 132)
        assert re.search(r"plan (\w+);", text)[1] in plans.values()
    assert set(dict(plan_sweep.plausible_plans(64, "t64_p1")).values()) == {
        f"t64_p1_{groups}_s2{rest}{split}"
        for groups, rest in (("k2", "_half"), ("k3", ""))
        for split in ("", "_split2", "_split4")
    }
