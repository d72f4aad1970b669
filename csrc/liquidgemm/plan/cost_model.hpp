// How long a plan takes: a formula whose constants bench/plan/fit.py fits to a sweep. Its twin is
// `predict` in bench/plan/fit.py; a test holds the two equal.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "liquidgemm/plan/divide.hpp"

namespace liquidgemm {

// Measured costs of a tile, in microseconds.
struct TileCost {
  TileShape tile;
  double block_us;     // a 64-deep block of K of all its panels
  double tile_us;      // what a tile costs beside its blocks: pipeline fill, epilogue
  double split_us[2];  // what it costs more if 2 or 4 CTAs share it along K
};

// The cost of a tile that is not measured is infinite, if a launch asks for it by name.
constexpr TileCost cost_of(std::span<TileCost const> costs, TileShape const& tile) {
  for (TileCost const& cost : costs) {
    if (has_same_name(cost.tile, tile))
      return cost;
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return {tile, kInfinity, kInfinity, {kInfinity, kInfinity}};
}

// Measured costs of a GPU; the bandwidth of its memory is part of the problem.
struct Costs {
  double launch_us;
  double occupancy_us;       // of a full last round; the next launch begins on SMs left idle
  double half_sm_occupancy;  // of occupancy_us, where a CTA takes half an SM
  double memory_efficiency;  // of the peak
  double m_tiles_share;      // of tile_us, and more where tiles share their weights
  double pair_gain;          // time of a block where pairs share tokens, over that of single CTAs
  std::span<TileCost const> tiles;

  // Whether it is measured: no plan of another tile is selected.
  constexpr bool knows(TileShape const& tile) const {
    return std::any_of(tiles.begin(), tiles.end(),
                       [&](TileCost const& cost) { return has_same_name(cost.tile, tile); });
  }
  constexpr TileCost of(TileShape const& tile) const { return cost_of(tiles, tile); }
};

// The same of grouped GEMMs, whose tiles share an SM and its memory otherwise: every CTA of half an
// SM is beside another one. No plan of them splits K by 4.
struct GroupedCosts {
  double launch_us;  // with a wait for the offsets
  double memory_efficiency;
  std::span<TileCost const> tiles;
};

// From this number of rounds on CTAs are out of step, and shared loads of pairs are faster.
inline constexpr int kManyRounds = 3;

// Microseconds: streaming the weights, the work of the busiest SM, and what is fixed.
struct Estimate {
  double memory, sm, fixed;

  // A soft maximum of the two, since near the crossover they slow each other: the sixth root of the
  // sum of sixth powers.
  double total() const {
    const double memory_cubed = memory * memory * memory;
    const double sm_cubed = sm * sm * sm;
    return fixed + std::cbrt(std::sqrt(memory_cubed * memory_cubed + sm_cubed * sm_cubed));
  }
};

inline Estimate estimate(Problem const& p, Plan const& plan, Division const& d, Costs const& c) {
  TileShape const& tile = plan.tile;
  const TileCost cost = c.of(tile);
  const double panels = ceil_div(p.n, kBlockRows);
  const double k_blocks = ceil_div(p.k, kBlockK);
  const double tokens = std::min<double>(p.m, tile.tokens);

  const double rounds = d.whole_rounds + (d.split_tiles > 0);
  const double stages = d.whole_rounds * std::ceil(double(d.stages) / plan.split_k) +
                        (d.split_tiles ? std::ceil(d.stages / 2.0) : 0);
  const double block_us =
      cost.block_us * (plan.pairs && d.whole_rounds >= kManyRounds ? c.pair_gain : 1);
  const double tile_us =
      cost.tile_us * (1 + tokens / tile.tokens) / 2 * (d.m_tiles > 1 ? 1 + c.m_tiles_share : 1);
  const double split_us = plan.split_k > 1 ? rounds * cost.split_us[plan.split_k == 4]
                          : d.split_tiles  ? cost.split_us[0]
                                           : 0;

  // The next launch begins on SMs that the last round leaves idle: half a GPU's worth hides most.
  const double busy = busy_at_the_end(plan, d, p.num_sms);
  const double share = tile.ctas_per_sm > 1 ? c.half_sm_occupancy : 1;
  return {
      .memory =
          panels * k_blocks * block_bytes(p.format) / (p.memory_bytes_per_us * c.memory_efficiency),
      .sm = stages * tile.stage_blocks * block_us + rounds * tile_us + split_us,
      .fixed = c.launch_us + c.occupancy_us * share * busy * busy * busy,
  };
}

}  // namespace liquidgemm
