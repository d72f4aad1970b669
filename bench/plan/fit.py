"""Fits the costs of plans to a sweep of bench sweep, for csrc/liquidgemm/plan/costs_*.hpp.

    python -m bench fit bench/results/h100-sxm/2026-11-27/plan_sweep.json --write h100

Prints how far the estimates are off, and the regret of the choices that follow: time of the chosen
plan over the best one. The formula is that of `estimate` in plan/cost_model.hpp, and plans that the
library does not consider (plan/rules.hpp) are left out: change the two together.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from liquidgemm.formats import int8, liquidquant

from ..core.machine import ROOT

# Bytes of a block, and what a header's names begin with.
FORMATS = {
    "liquidquant": (liquidquant.BLOCK_BYTES, "k"),
    "int8": (int8.BLOCK_BYTES, "kInt8"),
    "liquidquant6": (liquidquant.BLOCK_BYTES_6, "kLiquidQuant6"),
    "liquidquant_g32": (liquidquant.BLOCK_BYTES_G32, "kLiquidQuantG32"),
}
PLAN = ROOT / "csrc/liquidgemm/plan"
# Constants of the library, under the same names there.
SOFTNESS = 6.0
QUAD_CLUSTER_FIT = 0.91
HALF_SM_BYTES = 160e3
IDLE_SMS_BYTES = 220e3
MANY_ROUNDS = 3
NAMES = {  # of the costs that are not a tile's, in the library's order, and where the fit starts
    "launch_us": 1.0,
    "occupancy_us": 1.0,
    "half_sm_occupancy": 0.5,
    "memory_efficiency": 0.9,
    "m_tiles_share": 0.2,
}


def ceil_div(a, b):
    return np.ceil(a / b)


def tile_of(plan: str) -> str:
    """The tile of a plan, whose name begins with it."""
    return re.sub(r"_(split\d|pairs)$", "", plan)


@dataclass
class Sweep:
    """The rows of a sweep as columns."""

    n: np.ndarray
    k: np.ndarray
    m: np.ndarray
    tokens: np.ndarray
    panels: np.ndarray
    half_sm: np.ndarray  # whether a CTA takes half an SM
    stage_blocks: np.ndarray
    split_k: np.ndarray
    pairs: np.ndarray
    tile: np.ndarray  # index into names
    us: np.ndarray
    plans: np.ndarray  # names, such as t64_p1_k3_s2_split2
    names: list[str]  # of the tiles, such as t64_p1_k3_s2
    sms: int
    memory_bytes_per_us: float  # peak of the GPU
    format: str = "liquidquant"  # of the weights

    @classmethod
    def load(cls, path: Path) -> Sweep:
        data = json.loads(path.read_text(encoding="utf-8"))
        sweep = cls.of(data["rows"], data["sms"], data["memory_bytes_per_us"])
        return replace(sweep, format=data.get("format", "liquidquant"))

    @classmethod
    def of(cls, rows: list[dict], sms: int, memory_bytes_per_us: float) -> Sweep:
        plans = [row["plan"] for row in rows]
        tiles = [tile_of(plan) for plan in plans]
        shapes = [re.fullmatch(r"t(\d+)_p(\d+)_k\d+_s(\d+)(_half)?", tile) for tile in tiles]
        names = sorted(set(tiles), key=lambda t: (int(t[1 : t.index("_")]), t))
        splits = [re.search(r"split(\d+)$", plan) for plan in plans]

        def column(values) -> np.ndarray:
            return np.array(list(values), dtype=float)

        return cls(
            *(column(row[key] for row in rows) for key in ("n", "k", "m")),
            *(column(shape[i] for shape in shapes) for i in (1, 2)),
            np.array([shape[4] is not None for shape in shapes]),
            column(shape[3] for shape in shapes),
            column(int(split[1]) if split else 1 for split in splits),
            np.array([plan.endswith("_pairs") for plan in plans]),
            np.array([names.index(tile) for tile in tiles]),
            column(row["us"] for row in rows),
            np.array(plans),
            names,
            sms,
            memory_bytes_per_us,
        )

    @property
    def block_bytes(self) -> int:
        return FORMATS[self.format][0]

    def cluster(self) -> np.ndarray:
        return np.where(self.pairs, 2, self.split_k)

    def most_workers(self) -> np.ndarray:
        """Clusters that run at a time."""
        fit = np.where(self.cluster() == 4, QUAD_CLUSTER_FIT, 1.0)
        return np.maximum(1, np.floor(self.sms * fit / self.cluster()))

    def m_tiles(self) -> np.ndarray:
        unit = np.where(self.pairs, 16, 1)
        height = ceil_div(ceil_div(self.m, ceil_div(self.m, self.tokens)), unit) * unit
        return ceil_div(self.m, height)

    def units(self) -> np.ndarray:
        """Tiles, or pairs of them."""
        per_unit = self.panels * np.where(self.pairs, 2, 1)
        return self.m_tiles() * ceil_div(ceil_div(self.n, 64), per_unit)

    def rounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Units of a last round that is not full, whether pairs share it along K, whole rounds."""
        units, most = self.units(), self.most_workers()
        rest = units % most
        stages = ceil_div(ceil_div(self.k, 64), self.stage_blocks)
        # If half of the GPU would be idle.
        splits = self.pairs & (rest > 0) & (2 * rest <= most) & (stages > 1)
        return rest, splits, np.where(splits, np.floor(units / most), ceil_div(units, most))

    def pair_gain(self) -> float:
        """Time of pairs over that of single CTAs: median of good plans with as many rounds."""
        _, splits, whole = self.rounds()
        ratios = [
            self.us[i] / self.us[j]
            for rows in self.problems()
            for i in rows[self.pairs[rows] & ~splits[rows] & (whole[rows] >= MANY_ROUNDS)]
            for j in rows[self.plans[rows] == self.names[self.tile[i]]]
            if self.us[i] < 1.1 * self.us[rows].min()
        ]
        return float(np.median(ratios)) if ratios else 1.0

    def considered(self) -> Sweep:
        """Without what `select_plan` leaves out.

        Clusters of 4 in several rounds; half SMs in several rounds, or with too much to read; of
        INT8 weights too much to read beside idle SMs.
        """
        one_round = self.units() <= self.most_workers()
        stages = ceil_div(ceil_div(ceil_div(self.k, 64), self.stage_blocks), self.split_k)
        weights = stages * self.stage_blocks * self.block_bytes
        read = weights + stages * self.stage_blocks * 64 * self.tokens
        keep = (self.split_k < 4) | one_round
        keep &= ~self.half_sm | (one_round & (read <= HALF_SM_BYTES))
        k_groups = np.array([int(re.search(r"_k(\d+)", plan)[1]) for plan in self.plans])
        half_idle = 2 * self.units() * self.cluster() <= self.sms
        if self.format != "liquidquant":
            keep &= ~((k_groups > 1) & (self.split_k < 4) & half_idle & (weights > IDLE_SMS_BYTES))
        columns = {k: v[keep] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **columns)

    def problems(self) -> list[np.ndarray]:
        """Row indices of each (n, k, m)."""
        keys = np.stack([self.n, self.k, self.m], 1)
        return [np.flatnonzero((keys == key).all(1)) for key in np.unique(keys, axis=0)]


def predictor(s: Sweep, pair_gain: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function from the costs to the µs of each row; what does not depend on them is done once.

    The costs are logarithms: those of NAMES, then block_us, tile_us, split2_us and split4_us of
    every tile.
    """
    panels, k_blocks = ceil_div(s.n, 64), ceil_div(s.k, 64)
    stages = ceil_div(k_blocks, s.stage_blocks)
    units, most = s.units(), s.most_workers()
    rest, splits, whole = s.rounds()
    workers = np.where(splits & (whole == 0), 2 * rest, np.minimum(units, most))
    rounds = whole + splits

    busiest = whole * ceil_div(stages, s.split_k) + splits * ceil_div(stages, 2)
    gain = np.where(s.pairs & (whole >= MANY_ROUNDS), pair_gain, 1)
    blocks = busiest * s.stage_blocks * gain
    tiles = rounds * (1 + np.minimum(s.m, s.tokens) / s.tokens) / 2
    shares_weights = s.m_tiles() > 1
    # A round that pairs share is one.
    splits_by_2 = np.select([s.split_k == 2, splits], [rounds, 1.0], 0.0)
    splits_by_4 = np.where(s.split_k == 4, rounds, 0.0)

    last = np.where(splits, rest, units - (whole - 1) * workers)
    last_ctas = np.where(splits, 2 * rest, last) * s.cluster()
    busy_cubed = (last_ctas / s.sms) ** 3
    streaming = panels * k_blocks * s.block_bytes / s.memory_bytes_per_us

    def predict(parameters: np.ndarray) -> np.ndarray:
        values = np.exp(parameters)
        launch, occupancy, half_sm, efficiency, m_tiles_share = values[: len(NAMES)]
        block_us, tile_us, split2_us, split4_us = values[len(NAMES) :].reshape(4, -1)[:, s.tile]
        sm = blocks * block_us + tiles * tile_us * np.where(shares_weights, 1 + m_tiles_share, 1)
        sm += splits_by_2 * split2_us + splits_by_4 * split4_us
        memory = streaming / efficiency
        soft_max = (memory**SOFTNESS + sm**SOFTNESS) ** (1 / SOFTNESS)
        return launch + occupancy * np.where(s.half_sm, half_sm, 1) * busy_cubed + soft_max

    return predict


def predict(s: Sweep, parameters: np.ndarray, pair_gain: float) -> np.ndarray:
    """µs of each row; the costs as `predictor` takes them."""
    return predictor(s, pair_gain)(parameters)


def fit(s: Sweep, pair_gain: float, start: np.ndarray | None = None) -> np.ndarray:
    """Least squares in the logarithm of the time; near the best plan, errors weigh more.

    Returns the costs as `predictor` takes them. A `start` near them saves most of the time.
    """
    weights = np.empty_like(s.us)
    for rows in s.problems():
        ratio = s.us[rows] / s.us[rows].min()
        weights[rows] = np.select([ratio < 1.12, ratio < 1.6], [3.0, 1.0], 0.25)
    tiles = len(s.names)
    of_tiles = [0.05] * tiles + [1.0] * tiles + [0.5] * 2 * tiles
    if start is None:
        start = np.log([*NAMES.values(), *of_tiles])
    predicted = predictor(s, pair_gain)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return weights * np.log(predicted(parameters) / s.us)

    return least_squares(residuals, start, loss="soft_l1", f_scale=0.1, max_nfev=400).x


def tile_costs(s: Sweep, parameters: np.ndarray) -> list[tuple[float, ...]]:
    """block_us, tile_us, split2_us and split4_us of each tile; 0 for a split that no plan has."""
    by_two, by_four = (s.split_k == 2) | s.pairs, s.split_k == 4
    costs = np.exp(parameters[len(NAMES) :]).reshape(4, -1).T
    return [
        (*cost[:2], cost[2] * by_two[s.tile == i].any(), cost[3] * by_four[s.tile == i].any())
        for i, cost in enumerate(costs)
    ]


def header(s: Sweep, parameters: np.ndarray, pair_gain: float, gpu: str, source: str) -> str:
    """The text of plan/costs_GPU.hpp, or of its twin for another format.

    `source` says where the sweep comes from.
    """
    suffix, prefix = gpu.upper(), FORMATS[s.format][1]
    what = "" if s.format == "liquidquant" else f" with {s.format} weights"
    tiles = {
        name: "{:.4f}, {:.3f}, {{{:.3f}, {:.3f}}}".format(*costs)
        for name, costs in zip(s.names, tile_costs(s, parameters), strict=True)
    }
    constants = zip(
        [*NAMES, "pair_gain"], [*np.exp(parameters[: len(NAMES)]), pair_gain], strict=True
    )
    # What is next to nothing is not determined to four digits.
    lines = {name: f"{value:{'.4g' if value >= 0.01 else '.4f'}}" for name, value in constants}
    title = f"// Costs measured on an {suffix}{what}. Written by bench/plan/fit.py: do not edit."
    return header_text(
        title,
        source,
        f"{prefix}TileCostsOf{suffix}",
        tiles,
        "Costs",
        f"{prefix}CostsOf{suffix}",
        lines,
    )


def header_text(
    title: str,
    source: str,
    tiles_name: str,
    tiles: dict[str, str],
    kind: str,
    name: str,
    constants: dict[str, str],
) -> str:
    """A header of costs: those of tiles by their names, and constants by theirs, of a C++ class."""
    rows = []
    for tile, numbers in tiles.items():
        shape = re.findall(r"\d+", tile) + ["2"] * tile.endswith("_half")
        rows.append((f"    {{{{{', '.join(shape)}}}, {numbers}}},", tile))
    width = max(len(row) for row, _ in rows) + 2
    return "\n".join(
        [
            title,
            *(f"// {line}" for line in source.splitlines()),
            "#pragma once",
            "",
            '#include "liquidgemm/plan/cost_model.hpp"',
            "",
            "namespace liquidgemm {",
            "",
            f"inline constexpr TileCost {tiles_name}[] = {{",
            *(f"{row:{width}}// {tile}" for row, tile in rows),
            "};",
            "",
            f"inline constexpr {kind} {name} = {{",
            *(f"    .{constant} = {value}," for constant, value in constants.items()),
            f"    .tiles = {tiles_name},",
            "};",
            "",
            "}  // namespace liquidgemm",
            "",
        ]
    )


def provenance(path: Path) -> str:
    """Which sweep a header comes from: its file, the GPU, and the commits that were measured."""
    data = json.loads(path.read_text(encoding="utf-8"))
    name = path.resolve()
    name = name.relative_to(ROOT) if name.is_relative_to(ROOT) else name.name
    commits = ", ".join(dict.fromkeys(run["commit"] for run in data["runs"]))
    return f"Sweep: {name},\non an {data['gpu']}, of the kernels of {commits}."


def report(s: Sweep, parameters: np.ndarray, pair_gain: float) -> None:
    predicted = predict(s, parameters, pair_gain)
    error = np.abs(np.log(predicted / s.us))
    print(f"error of the estimate: median {np.median(error):.3f}")
    regrets = []
    for rows in s.problems():
        chosen = rows[predicted[rows].argmin()]
        regrets.append((s.us[chosen] / s.us[rows].min(), chosen))
    regrets.sort(reverse=True)
    print(f"regret: mean {np.mean([r for r, _ in regrets]):.3f}; the worst:")
    for regret, row in regrets[:12]:
        print(f"  {regret:.3f}  {s.n[row]:.0f}x{s.k[row]:.0f} m={s.m[row]:.0f}: {s.plans[row]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench fit", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("sweep", type=Path, help="JSON of bench sweep")
    parser.add_argument(
        "--write",
        metavar="GPU",
        help="write csrc/liquidgemm/plan/costs_GPU.hpp, or with the name of another format than "
        "LiquidQuant costs_GPU_FORMAT.hpp (printed by default)",
    )
    options = parser.parse_args(arguments)
    sweep = Sweep.load(options.sweep).considered()
    gain = sweep.pair_gain()
    costs = fit(sweep, gain)
    text = header(sweep, costs, gain, options.write or "h100", provenance(options.sweep))
    if options.write:
        of_format = "" if sweep.format == "liquidquant" else f"_{sweep.format}"
        file = PLAN / f"costs_{options.write.lower()}{of_format}.hpp"
        file.write_text(text, encoding="utf-8")
        print(f"written: {file}")
    else:
        print(text)
    report(sweep, costs, gain)
