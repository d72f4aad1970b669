"""Fits the costs of grouped plans to sweeps of bench moe --sweep, for plan/grouped_costs_*.hpp.

    python -m bench fit-grouped bench/results/h100-sxm/2026-11-28/moe_sweep*.json --write h100

Prints how far the estimates are off, and the regret of the choices that follow: time of the chosen
plan over the best one. With --leave-out each layer and number of tokens is chosen for by costs that
are fitted to all others. The formula is that of `estimated_us` in plan/grouped.hpp: change the two
together. Plans that are no longer compiled are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from liquidgemm.formats.liquidquant import BLOCK_BYTES
from liquidgemm.ops.plans import H100_MEMORY_TBPS, grouped_plan_names

from ..core.experts import LAYERS
from ..core.machine import ROOT
from .fit import PLAN, SOFTNESS, ceil_div, header_text, tile_of

# Of the costs that are not a tile's, in the library's order, and where the fit starts.
NAMES = {"launch_us": 2.0, "memory_efficiency": 0.9}
PRIOR = 0.02  # of the start, beside a weight of 1 per row: decides what no row does


def expected_rows(rows: int, experts: int, tile_tokens: int) -> tuple[float, float]:
    """Active experts, and m tiles of all: the twin of `expected_rows` in plan/grouped.hpp."""
    mean = rows / experts
    if mean > 16 * tile_tokens or mean > 500:
        return experts, experts * (mean / tile_tokens + 0.5)
    probability, active, tiles = math.exp(-mean), 0.0, 0.0
    for count in range(int(mean + 12 * math.sqrt(mean) + 24) + 1):
        active += probability * (count > 0)
        tiles += probability * -(-count // tile_tokens)
        probability *= mean / (count + 1)
    return max(1.0, active * experts), max(1.0, tiles * experts)


@dataclass
class GroupedSweep:
    """The rows of sweeps as columns; `us` of each plan, by its problem."""

    tile: np.ndarray  # index into names
    split_k: np.ndarray
    stage_blocks: np.ndarray
    rounds: np.ndarray
    stages: np.ndarray  # of a CTA, per tile
    streaming: np.ndarray  # µs at the peak of the memory
    us: np.ndarray
    plans: np.ndarray
    problems: np.ndarray  # layer, tokens and product, as text
    names: list[str]  # of the tiles

    @classmethod
    def load(cls, paths: Sequence[Path], memory_tbps: float = H100_MEMORY_TBPS) -> GroupedSweep:
        rows = []
        for path in paths:
            data = json.loads(path.read_text(encoding="utf-8"))
            sms = data["machine"]["sms"]
            for case in data["sweep"]:
                about = {
                    "rows": round(case["rows"]),
                    "experts": LAYERS[case["layer"]].local_experts,
                    "problem": f"{case['layer']}, {case['tokens']} tokens, "
                    f"product {case['product']}, {path.stem}",
                }
                rows += [
                    {"n": case["n"], "k": case["k"], "plan": plan, "us": us} | about
                    for plan, us in case["times"].items()
                ]
        return cls.of(rows, sms, memory_tbps * 1e6)

    @classmethod
    def of(cls, rows: list[dict], sms: int, memory_bytes_per_us: float) -> GroupedSweep:
        compiled = grouped_plan_names()
        names = list(dict.fromkeys(map(tile_of, compiled)))
        rows = [row for row in rows if row["plan"] in compiled]
        columns = []
        for row in rows:
            tile = tile_of(row["plan"])
            shape = re.fullmatch(r"t(\d+)_p(\d+)_k\d+_s(\d+)(_half)?", tile)
            assert shape
            split = re.search(r"split(\d+)$", row["plan"])
            split_k, stage_blocks = int(split[1]) if split else 1, int(shape[3])
            tokens = min(int(shape[1]), max(row["rows"], 1))
            panels, k_blocks = -(-row["n"] // 64), -(-row["k"] // 64)
            n_tiles = -(-panels // int(shape[2]))
            active, m_tiles = expected_rows(row["rows"], row["experts"], tokens)
            most_tiles = (row["rows"] // tokens + min(row["rows"], row["experts"])) * n_tiles
            most_workers = max(1, sms * (2 if shape[4] else 1) // split_k)
            columns.append(
                (
                    names.index(tile),
                    split_k,
                    stage_blocks,
                    math.ceil(m_tiles * n_tiles / min(most_tiles, most_workers)),
                    ceil_div(ceil_div(k_blocks, stage_blocks), split_k),
                    active * panels * k_blocks * BLOCK_BYTES / memory_bytes_per_us,
                    row["us"],
                )
            )
        numbers = np.array(columns, dtype=float).T
        plans, problems = (np.array([row[key] for row in rows]) for key in ("plan", "problem"))
        return cls(numbers[0].astype(int), *numbers[1:], plans, problems, names)

    def only(self, keep: np.ndarray) -> GroupedSweep:
        columns = {k: v[keep] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **columns)

    def by_problem(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.problems == p) for p in dict.fromkeys(self.problems)]


def predictor(s: GroupedSweep) -> Callable[[np.ndarray], np.ndarray]:
    """A function from the costs to the µs of each row.

    The costs are logarithms: those of NAMES, then block_us, tile_us and split2_us of every tile.
    """
    splits = s.split_k > 1

    def predict(parameters: np.ndarray) -> np.ndarray:
        values = np.exp(parameters)
        launch, efficiency = values[: len(NAMES)]
        block_us, tile_us, split_us = values[len(NAMES) :].reshape(3, -1)[:, s.tile]
        tile = s.stages * s.stage_blocks * block_us + tile_us + splits * split_us
        memory, sm = s.streaming / efficiency, s.rounds * tile
        return launch + (memory**SOFTNESS + sm**SOFTNESS) ** (1 / SOFTNESS)

    return predict


def fit(s: GroupedSweep) -> np.ndarray:
    """Least squares in the logarithm of the time; near the best plan, errors weigh more."""
    weights = np.empty_like(s.us)
    for rows in s.by_problem():
        ratio = s.us[rows] / s.us[rows].min()
        weights[rows] = np.select([ratio < 1.12, ratio < 1.6], [3.0, 1.0], 0.25)
    shapes = [[int(n) for n in re.findall(r"\d+", name)] for name in s.names]
    halves = [2 if name.endswith("_half") else 1 for name in s.names]
    # A start near enough for any tile: 64 channels take 0.04 µs of an SM, and 0.0005 per token.
    blocks = [h * p * (0.04 + 0.0005 * t) for h, (t, p, *_) in zip(halves, shapes, strict=True)]
    start = np.log([*NAMES.values(), *blocks, *[1.0] * len(shapes), *[0.3] * len(shapes)])
    predicted = predictor(s)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        rows = weights * np.log(predicted(parameters) / s.us)
        return np.concatenate([rows, PRIOR * (parameters - start)])

    return least_squares(residuals, start, loss="soft_l1", f_scale=0.1, max_nfev=400).x


def header(s: GroupedSweep, parameters: np.ndarray, gpu: str, source: str) -> str:
    """The text of plan/grouped_costs_GPU.hpp; `source` says where the sweeps come from."""
    suffix = gpu.upper()
    costs = np.exp(parameters[len(NAMES) :]).reshape(3, -1).T
    tiles = {}
    for i, (name, (block_us, tile_us, split_us)) in enumerate(zip(s.names, costs, strict=True)):
        split = split_us * (s.split_k[s.tile == i] > 1).any()
        tiles[name] = f"{block_us:.4f}, {tile_us:.3f}, {{{split:.3f}, 0}}"
    constants = zip(NAMES, np.exp(parameters[: len(NAMES)]), strict=True)
    lines = {name: f"{value:.4g}" for name, value in constants}
    title = f"// Costs measured on an {suffix}. Written by bench/plan/fit_grouped.py: do not edit."
    names = f"kGroupedTileCostsOf{suffix}", f"kGroupedCostsOf{suffix}"
    return header_text(title, source, names[0], tiles, "GroupedCosts", names[1], lines)


def provenance(paths: Sequence[Path]) -> str:
    """Which sweeps a header comes from: files, GPUs, and the commits that were measured."""
    lines = []
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        name = path.resolve()
        name = name.relative_to(ROOT) if name.is_relative_to(ROOT) else Path(name.name)
        lines += [f"Sweep: {name},", f"on an {data['machine']['gpu']}, of {data['commit']}."]
    return "\n".join(lines)


def regrets(s: GroupedSweep, predicted: np.ndarray) -> list[tuple[float, str, str, str]]:
    """Time of the chosen plan over that of the best, problem, chosen and best plan; worst first."""
    found = []
    for rows in s.by_problem():
        chosen, best = rows[predicted[rows].argmin()], rows[s.us[rows].argmin()]
        ratio = float(s.us[chosen] / s.us[best])
        found.append((ratio, s.problems[best], s.plans[chosen], s.plans[best]))
    return sorted(found, reverse=True)


def left_out(s: GroupedSweep) -> np.ndarray:
    """What costs predict that are fitted without the layer and the number of tokens."""
    cases = np.array([problem.rsplit(", product", 1)[0] for problem in s.problems])
    predicted = np.empty_like(s.us)
    for case in dict.fromkeys(cases):
        out = cases == case
        predicted[out] = predictor(s.only(out))(fit(s.only(~out)))
    return predicted


def report(s: GroupedSweep, predicted: np.ndarray, title: str) -> None:
    print(f"{title}: median error {np.median(np.abs(np.log(predicted / s.us))):.3f}")
    found = regrets(s, predicted)
    print(f"regret: mean {np.mean([r[0] for r in found]):.4f} of {len(found)}; the worst:")
    for ratio, problem, chosen, best in found[:10]:
        print(f"  {ratio:.3f}  {problem}: {chosen} instead of {best}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench fit-grouped", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("sweeps", type=Path, nargs="+", help="JSON of bench moe --sweep")
    parser.add_argument(
        "--write",
        metavar="GPU",
        help="write csrc/liquidgemm/plan/grouped_costs_GPU.hpp (printed by default)",
    )
    parser.add_argument("--leave-out", action="store_true", help="choices for what is not fitted")
    options = parser.parse_args(arguments)
    sweep = GroupedSweep.load(options.sweeps)
    costs = fit(sweep)
    text = header(sweep, costs, options.write or "h100", provenance(options.sweeps))
    if options.write:
        file = PLAN / f"grouped_costs_{options.write.lower()}.hpp"
        file.write_text(text, encoding="utf-8")
        print(f"written: {file}")
    else:
        print(text)
    report(sweep, predictor(sweep)(costs), "fitted")
    if options.leave_out:
        report(sweep, left_out(sweep), "left out")
