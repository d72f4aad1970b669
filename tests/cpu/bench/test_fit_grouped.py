"""The fit of grouped costs: the formula is the library's, and so are the costs and the choices."""

import re

import numpy as np
import pytest

pytest.importorskip("scipy")
from bench.core import machine
from bench.plan import fit_grouped as fit
from liquidgemm.ops.plans import grouped_plan, grouped_plan_names

COSTS = fit.PLAN / "grouped_costs_h100.hpp"
PROBLEMS = [
    *((2, 8, 28672, 4096), (16, 8, 4096, 14336), (256, 8, 28672, 4096), (8192, 8, 4096, 14336)),
    *((8, 128, 1536, 2048), (1024, 128, 2048, 768), (32768, 128, 1536, 2048)),
    *((1, 32, 4096, 7168), (507, 32, 7168, 2048), (64, 32, 5760, 2880), (3, 1024, 100, 100)),
]


def library_costs() -> tuple[list[str], np.ndarray]:
    """Tiles, and parameters as `fit.predictor` takes them."""
    text, number = COSTS.read_text(), r"([\d.]+)"
    costs = re.findall(
        rf"\{{[\d, ]+\}}, {number}, {number}, \{{{number}, 0\}}\}},\s+// (t\d+_p\d+_k\d+_s\d+\S*)",
        text,
    )
    constants = [float(re.search(rf"\.{name} = ([\d.]+),", text)[1]) for name in fit.NAMES]
    by_kind = np.array([cost[:3] for cost in costs], dtype=float).T.ravel()
    with np.errstate(divide="ignore"):  # what no plan of a tile has costs nothing
        return [cost[3] for cost in costs], np.log([*constants, *by_kind])


def test_formula_is_the_library_s() -> None:
    """Both estimate the same time for the plan that both choose."""
    tiles, parameters = library_costs()
    chosen = set()
    for rows, experts, n, k in PROBLEMS:
        problem = {"rows": rows, "experts": experts, "n": n, "k": k, "us": 1.0, "problem": ""}
        stages = -(-k // 64)
        plans = [p for p in grouped_plan_names() if "split" not in p or stages > 8]
        sweep = fit.GroupedSweep.of([problem | {"plan": plan} for plan in plans], 132, 3.35e6)
        assert sweep.names == tiles
        us = fit.predictor(sweep)(parameters)
        found = re.search(
            r"plan (\S+), .* estimated ([\d.e+]+) us", grouped_plan(rows, experts, n, k)
        )
        best = int(us.argmin())
        assert found[1] == plans[best], (rows, experts, n, k)
        assert float(found[2]) == pytest.approx(us[best], rel=1e-3)
        chosen.add(found[1])
    assert len(chosen) >= 6


def test_costs_are_those_of_the_published_sweeps() -> None:
    """`python -m bench fit-grouped --write h100` makes the header of the files that it names."""
    text = COSTS.read_text()
    paths = [machine.ROOT / name for name in re.findall(r"// Sweep: (\S+),", text)]
    sweep = fit.GroupedSweep.load(paths)
    costs = fit.fit(sweep)
    written = fit.header(sweep, costs, "h100", fit.provenance(paths))
    number = re.compile(r"\b\d+\.\d+\b")
    # Spaces before comments are clang-format's.
    assert number.sub("#", written).split() == number.sub("#", text).split()
    for found, expected in zip(number.findall(written), number.findall(text), strict=True):
        last_place = 10.0 ** -len(expected.partition(".")[2])
        assert float(found) == pytest.approx(float(expected), abs=1.5 * last_place), expected
    # Few choices cost much, and none that is known to be wrong is made.
    regrets = fit.regrets(sweep, fit.predictor(sweep)(costs))
    assert np.mean([ratio for ratio, *_ in regrets]) < 1.01
    assert regrets[0][0] < 1.06


def test_costs_of_a_model_are_recovered() -> None:
    """From times of the formula itself, with other costs, in whatever they decide."""
    tiles, parameters = library_costs()
    rows = [
        {"rows": r, "experts": e, "n": n, "k": k, "us": 1.0, "plan": p, "problem": f"{r} {e} {n}"}
        for r, e, n, k in PROBLEMS
        for p in grouped_plan_names()
    ]
    sweep = fit.GroupedSweep.of(rows, 132, 3.35e6)
    changed = np.maximum(parameters, np.log(1e-3)) + np.linspace(-0.2, 0.2, len(parameters))
    sweep.us = fit.predictor(sweep)(changed)
    found = fit.predictor(sweep)(fit.fit(sweep))
    np.testing.assert_allclose(found, sweep.us, rtol=0.05)
    assert len(tiles) == len(sweep.names)
