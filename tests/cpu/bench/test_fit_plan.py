"""The fit of the heuristic: it recovers the constants of a model that predicts the data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
from bench.core import machine
from bench.plan import fit
from bench.plan import sweep as plan_sweep
from liquidgemm.ops.plans import compiled_plans, explain_plan

COSTS = {
    "liquidquant": fit.PLAN / "costs_h100.hpp",
    "int8": fit.PLAN / "costs_h100_int8.hpp",
    "liquidquant6": fit.PLAN / "costs_h100_liquidquant6.hpp",
    "liquidquant_g32": fit.PLAN / "costs_h100_liquidquant_g32.hpp",
}
FITTED = ("liquidquant", "int8")  # whose headers are as they were written
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


def library_constant(file: str, name: str) -> float:
    """A number of csrc/liquidgemm/plan, as it is written there."""
    match = re.search(rf"\b{name} = ([0-9.e-]+)[;,]", (fit.PLAN / file).read_text())
    assert match, f"{file} has no {name}"
    return float(match[1])


def library_costs(costs_file: Path) -> tuple[list[str], np.ndarray, float]:
    """Tiles, parameters as `fit.predictor` takes them, and pair_gain."""
    number = r"([\d.]+)"
    costs = re.findall(
        rf"\{{[\d, ]+\}}, {number}, {number}, \{{{number}, {number}\}}\}},\s+"
        r"// (t\d+_p\d+_k\d+_s\d+\S*)",
        costs_file.read_text(),
    )
    by_kind = np.array([cost[:4] for cost in costs], dtype=float).T.ravel()
    constants = [library_constant(costs_file.name, name) for name in fit.NAMES]
    with np.errstate(divide="ignore"):  # what no plan of a tile has costs nothing
        parameters = np.log([*constants, *by_kind])
    return [cost[4] for cost in costs], parameters, library_constant(costs_file.name, "pair_gain")


def test_constants_are_the_library_s() -> None:
    assert library_constant("divide.hpp", "kQuadClusterFit") == fit.QUAD_CLUSTER_FIT
    assert library_constant("rules.hpp", "kHalfSmBytes") == fit.HALF_SM_BYTES
    assert library_constant("rules.hpp", "kMostBytesBesideIdleSms") == fit.IDLE_SMS_BYTES
    assert library_constant("cost_model.hpp", "kManyRounds") == fit.MANY_ROUNDS


@pytest.mark.parametrize(
    ("format", "bits", "group"),
    [("liquidquant", 4, 64), ("int8", 8, 64), ("liquidquant6", 6, 64), ("liquidquant_g32", 4, 32)],
)
def test_formula_is_the_library_s(format: str, bits: int, group: int) -> None:
    """`estimate` in cost_model.hpp and `predictor` agree on every plan that is scored."""
    tiles, parameters, pair_gain = library_costs(COSTS[format])
    plans = [name for _, name in compiled_plans(bits, group)]
    assert tiles == list(dict.fromkeys(map(fit.tile_of, plans)))
    scored = set()
    for m, n, k in [
        *((1, 28672, 4096), (16, 10240, 8192), (64, 1024, 8192), (4096, 6144, 4096)),
        *((8, 2048, 2048), (32, 4096, 4096), (64, 6144, 4096), (1, 8192, 1024)),
        *((256, 4096, 4096), (1024, 10240, 8192), (100, 4096, 14336), (8192, 8192, 8192)),
    ]:
        explained = explain_plan(m, n, k, bits=bits, group_size=group)
        candidates = [c for c in explained.candidates if c.us is not None]
        rows = [{"n": n, "k": k, "m": m, "plan": c.plan, "us": 1.0} for c in candidates]
        sweep = replace(fit.Sweep.of(rows, 132, 3.35e6), format=format)
        sweep.tile = np.array([tiles.index(fit.tile_of(c.plan)) for c in candidates])
        predicted = fit.predict(sweep, parameters, pair_gain)
        np.testing.assert_allclose(predicted, [c.us for c in candidates], rtol=1e-5)
        # Both leave out the same plans.
        assert len(sweep.considered().us) == len(rows)
        scored |= {c.plan for c in candidates}
    kinds = {plan.rsplit("_", 1)[-1] for plan in scored}
    assert kinds >= (
        {"pairs", "split4", "s2", "half"} if format == "liquidquant" else {"pairs", "split2", "s2"}
    )
    groups = {re.search(r"_k(\d)_", plan)[1] for plan in scored}
    assert groups >= ({"1", "2", "3", "4"} if format == "liquidquant" else {"1", "3", "4"})


@pytest.mark.parametrize("format", FITTED)
def test_costs_are_those_of_the_published_sweep(format: str) -> None:
    """A header is what `python -m bench fit --write h100` makes of the file that it names."""
    costs_file = COSTS[format]
    text = costs_file.read_text()
    path = machine.ROOT / re.search(r"// Sweep: (\S+),", text)[1]
    tiles, start, _ = library_costs(costs_file)
    sweep = fit.Sweep.load(path).considered()
    assert sweep.names == tiles
    gain = sweep.pair_gain()
    with np.errstate(divide="ignore"):
        start = np.maximum(start, np.log(1e-4))  # a split that no plan has
    costs = fit.fit(sweep, gain, start)
    written = fit.header(sweep, costs, gain, "h100", fit.provenance(path))
    number = re.compile(r"\b\d+\.\d+\b")
    assert number.sub("#", written) == number.sub("#", text)
    for found, expected in zip(number.findall(written), number.findall(text), strict=True):
        last_place = 10.0 ** -len(expected.partition(".")[2])
        assert float(found) == pytest.approx(float(expected), abs=1.5 * last_place), expected


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
    explained = explain_plan(*sizes, op="linear")
    assert ("one launch", "two launches")[explained.launches - 1] == launches.split(",")[0]
    assert launches == "one launch" or launches.endswith(explained.plan)
    if explained.launches == 1:
        assert explained.plan == explain_plan(*sizes).plan


def test_only_plausible_plans_are_swept_and_chosen():
    for m in (1, 16, 17, 64, 100, 128, 1000, 4096):
        plans = dict(plan_sweep.plausible_plans(m, "", "liquidquant"))
        tokens = {int(re.match(r"t(\d+)_", name)[1]) for name in plans.values()}
        assert max(tokens) < (2 if m <= 16 else 4) * max(m, 8)
        assert min(tokens) >= min(m / 4, 128)
        assert explain_plan(m, 4096, 4096).plan in plans.values()
    assert set(dict(plan_sweep.plausible_plans(64, "t64_p1", "liquidquant")).values()) == {
        f"t64_p1_{groups}_s2{rest}{split}"
        for groups, rest in (("k2", "_half"), ("k3", ""))
        for split in ("", "_split2", "_split4")
    }
