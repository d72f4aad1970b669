"""Fits the constants of csrc/liquidgemm/host/plan.hpp to a sweep of bench.plan_sweep.

Prints them, and the regret of the choices that follow: time of the chosen plan over the best one.
The formula is that of `estimate` in plan.hpp; change the two together.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

BLOCK_BYTES = 2176
SOFTNESS = 6.0
QUAD_CLUSTER_FIT = 0.91
SHARED = 5  # parameters that are not a tile's


def ceil_div(a, b):
    return np.ceil(a / b)


@dataclass
class Sweep:
    """The rows of a sweep as columns."""

    n: np.ndarray
    k: np.ndarray
    m: np.ndarray
    tokens: np.ndarray
    panels: np.ndarray
    stage_blocks: np.ndarray
    split_k: np.ndarray
    tile: np.ndarray  # index into names
    us: np.ndarray
    names: list[str]
    sms: int
    memory_bytes_per_us: float  # peak of the GPU

    @classmethod
    def load(cls, path: str) -> Sweep:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        rows = data["rows"]
        names = sorted({row["tile"] for row in rows}, key=lambda t: (int(t[1 : t.index("_")]), t))
        shapes = [list(map(int, re.findall(r"\d+", row["tile"]))) for row in rows]

        def column(key: str) -> np.ndarray:
            return np.array([row[key] for row in rows], dtype=float)

        tokens, panels, _, stage_blocks = np.array(shapes, dtype=float).T
        return cls(
            column("n"),
            column("k"),
            column("m"),
            tokens,
            panels,
            stage_blocks,
            column("split_k"),
            np.array([names.index(row["tile"]) for row in rows]),
            column("us"),
            names,
            data["sms"],
            data["memory_bytes_per_us"],
        )

    def workers(self) -> np.ndarray:
        """Tiles that are computed at a time."""
        fit = np.where(self.split_k == 4, QUAD_CLUSTER_FIT, 1.0)
        return np.floor(self.sms * fit / self.split_k)

    def m_tiles(self) -> np.ndarray:
        return ceil_div(self.m, self.tokens)

    def tiles(self) -> np.ndarray:
        return self.m_tiles() * ceil_div(ceil_div(self.n, 64), self.panels)

    def considered(self) -> Sweep:
        """Without what `select_plan` leaves out: clusters of 4 in several waves."""
        keep = (self.split_k < 4) | (self.tiles() <= self.workers())
        columns = {k: v[keep] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **columns)

    def problems(self) -> list[np.ndarray]:
        """Row indices of each (n, k, m)."""
        keys = np.stack([self.n, self.k, self.m], 1)
        return [np.flatnonzero((keys == key).all(1)) for key in np.unique(keys, axis=0)]


def predict(s: Sweep, parameters: np.ndarray) -> np.ndarray:
    """µs of each row; parameters are logarithms, in the order that `report` prints."""
    values = np.exp(parameters)
    launch, occupancy, efficiency, share, m_tiles_share = values[:SHARED]
    block_us, tile_us, split2_us, split4_us = values[SHARED:].reshape(4, -1)[:, s.tile]
    split_us = np.select([s.split_k == 2, s.split_k == 4], [split2_us, split4_us], 0.0)

    panels, k_blocks = ceil_div(s.n, 64), ceil_div(s.k, 64)
    tiles, workers = s.tiles(), s.workers()
    waves = ceil_div(tiles, workers)
    last_wave = tiles - (waves - 1) * workers
    tokens = np.minimum(s.m, s.tokens)

    last_reach = np.minimum(1, last_wave * s.split_k * share / s.sms)
    weight_bytes = panels * k_blocks * BLOCK_BYTES
    bandwidth = s.memory_bytes_per_us * efficiency
    memory = weight_bytes / bandwidth * ((tiles - last_wave) + last_wave / last_reach) / tiles
    slabs = ceil_div(k_blocks, s.stage_blocks)
    blocks = ceil_div(slabs, s.split_k) * s.stage_blocks
    shared = np.where(s.m_tiles() > 1, 1 + m_tiles_share, 1)
    tile_us = tile_us * (1 + tokens / s.tokens) / 2 * shared
    sm = waves * (blocks * block_us + tile_us + split_us)
    busy = np.minimum(s.sms, np.minimum(tiles, workers) * s.split_k)
    soft_max = (memory**SOFTNESS + sm**SOFTNESS) ** (1 / SOFTNESS)
    return launch + occupancy * busy / s.sms + soft_max


def fit(s: Sweep) -> np.ndarray:
    """Least squares in the logarithm of the time; near the best plan, errors weigh more."""
    weights = np.empty_like(s.us)
    for rows in s.problems():
        ratio = s.us[rows] / s.us[rows].min()
        weights[rows] = np.select([ratio < 1.12, ratio < 1.6], [3.0, 1.0], 0.25)
    tiles = len(s.names)
    start = np.log([1, 1, 0.9, 2.5, 0.2] + [0.05] * tiles + [1.0] * tiles + [0.5] * 2 * tiles)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return weights * np.log(predict(s, parameters) / s.us)

    return least_squares(residuals, start, loss="soft_l1", f_scale=0.1, max_nfev=400).x


def report(s: Sweep, parameters: np.ndarray) -> None:
    values = np.exp(parameters)
    names = "launch_us occupancy_us memory_efficiency sm_memory_share m_tiles_share"
    for name, value in zip(names.split(), values[:SHARED], strict=True):
        print(f"{name} = {value:.4g}")
    for name, costs in zip(s.names, values[SHARED:].reshape(4, -1).T, strict=True):
        print("{{{:.4f}, {:.3f}, {{{:.3f}, {:.3f}}}}},  // {}".format(*costs, name))
    predicted = predict(s, parameters)
    regrets = []
    for rows in s.problems():
        chosen = rows[predicted[rows].argmin()]
        regrets.append((s.us[chosen] / s.us[rows].min(), chosen))
    regrets.sort(reverse=True)
    print(f"regret: mean {np.mean([r for r, _ in regrets]):.3f}; the worst:")
    for regret, row in regrets[:12]:
        print(
            f"  {regret:.3f}  {s.n[row]:.0f}x{s.k[row]:.0f} m={s.m[row]:.0f}: chose "
            f"{s.names[s.tile[row]]}, split_k {s.split_k[row]:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("sweep", help="JSON of bench.plan_sweep")
    sweep = Sweep.load(parser.parse_args().sweep).considered()
    report(sweep, fit(sweep))


if __name__ == "__main__":
    main()
