// Which configuration runs a problem: a pure function of the sizes and the SM count, printable and
// tested on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/quant/pack.hpp"

namespace liquidgemm {

struct Problem {
  int64_t m, n, k;
  int num_sms;
  double memory_bytes_per_us;  // peak of the GPU
};

struct Plan {
  int tile;     // index into kTileShapes
  int split_k;  // CTAs of a cluster that share one output tile along K
};

// Measured costs of a tile, in the order of kTileShapes: one 64-deep block of K of all its panels,
// everything that a tile costs beside its blocks (pipeline fill, epilogue), and what it costs more
// if 2 or 4 CTAs share it along K.
struct TileCost {
  double block_us, tile_us, split_us[2];
};

// All constants come from bench/fit_plan.py and a sweep over every plan on an H200, whose SMs are
// those of an H100; the memory's bandwidth is asked of the GPU.
inline constexpr TileCost kTileCosts[] = {
    {0.0461, 0.554, {0.562, 0.593}},    // t8_p1_k4
    {0.0472, 0.690, {0.444, 0.491}},    // t16_p1_k4
    {0.0620, 0.823, {0.379, 0.487}},    // t32_p1_k4
    {0.0794, 1.150, {0.558, 0.724}},    // t64_p1_k4
    {0.2614, 1.105, {2.363, 2.481}},    // t64_p4_k1
    {0.1822, 1.219, {3.821, 3.659}},    // t128_p2_k1
    {0.2556, 1.444, {4.132, 4.057}},    // t128_p3_k1
    {0.3542, 1.522, {4.386, 4.544}},    // t128_p4_k1
    {0.3114, 1.927, {10.402, 12.698}},  // t256_p2_k1
};
static_assert(sizeof(kTileCosts) / sizeof(kTileCosts[0]) == kNumTileShapes);

struct CostModel {
  double launch_us = 0.8654;
  double occupancy_us = 1.038;        // a launch that leaves SMs idle overlaps with the next one
  double memory_efficiency = 0.9742;  // of the peak
  double sm_memory_share = 2.538;     // how far one SM can exceed its fair share of the bandwidth
  double m_tiles_share = 0.3415;      // of tile_us, and more where tiles share their weights
  double quad_cluster_fit = 0.91;     // clusters of 4 do not tile the GPCs
};

// Tiles that are computed at a time.
inline double workers(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  const double fit = plan.split_k == 4 ? c.quad_cluster_fit : 1.0;
  return std::max(1.0, std::floor(p.num_sms * fit / plan.split_k));
}

inline double count_tiles(Problem const& p, TileShape const& shape) {
  return double(ceil_div(p.m, shape.tokens)) * ceil_div(ceil_div(p.n, kBlockRows), shape.panels);
}

// Time of one plan, in microseconds: the larger of streaming the weights and of what the busiest SM
// has to do (softly: near the crossover the two get in each other's way), and what is fixed.
struct Estimate {
  double memory, sm, fixed;
  double total() const { return fixed + std::pow(std::pow(memory, 6) + std::pow(sm, 6), 1.0 / 6); }
};

inline Estimate estimate(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  TileShape const& shape = kTileShapes[plan.tile];
  TileCost const& cost = kTileCosts[plan.tile];
  const double panels = ceil_div(p.n, kBlockRows);
  const double k_blocks = ceil_div(p.k, kBlockK);
  const double slabs = std::ceil(k_blocks / shape.stage_blocks);
  const double tiles = count_tiles(p, shape);
  const double at_a_time = workers(p, plan, c);
  const double waves = std::ceil(tiles / at_a_time);
  const double last_wave = tiles - (waves - 1) * at_a_time;
  const double tokens = std::min<double>(p.m, shape.tokens);

  // A last wave on few SMs cannot use all of the bandwidth.
  const double last_reach = std::min(1.0, last_wave * plan.split_k * c.sm_memory_share / p.num_sms);
  const double blocks = std::ceil(slabs / plan.split_k) * shape.stage_blocks;
  const double busy = std::min<double>(p.num_sms, std::min(tiles, at_a_time) * plan.split_k);
  const double tile_us = cost.tile_us * (1 + tokens / shape.tokens) / 2 *
                         (p.m > shape.tokens ? 1 + c.m_tiles_share : 1);
  const double split_us = plan.split_k == 1 ? 0 : cost.split_us[plan.split_k == 4];
  Estimate e;
  e.memory = panels * k_blocks * kBlockBytes / (p.memory_bytes_per_us * c.memory_efficiency) *
             ((tiles - last_wave) + last_wave / last_reach) / tiles;
  e.sm = waves * (blocks * cost.block_us + tile_us + split_us);
  e.fixed = c.launch_us + c.occupancy_us * busy / p.num_sms;
  return e;
}

// Tiles far too large or too small for m tokens were not measured (bench/plan_sweep.py has the same
// rule): the estimate says nothing of them.
inline bool is_plausible(TileShape const& shape, int64_t m) {
  const bool too_large = shape.tokens >= (m <= 16 ? 2 : 4) * std::max<int64_t>(m, 8);
  const bool too_small = m > 4 * shape.tokens && shape.tokens < 128;
  return !too_large && !too_small;
}

inline Plan select_plan(Problem const& p) {
  Plan best{0, 1};
  double best_us = 1e300;
  const int64_t k_blocks = ceil_div(p.k, kBlockK);
  for (int tile = 0; tile < kNumTileShapes; ++tile) {
    if (!is_plausible(kTileShapes[tile], p.m))
      continue;
    for (int split_k : kSplits) {
      const Plan plan{tile, split_k};
      if (split_k > p.num_sms)
        continue;
      if (split_k > 1 && k_blocks < int64_t(split_k) * kTileShapes[tile].stage_blocks)
        continue;
      // Clusters of 4 that have to take turns were always slower than the model says.
      if (split_k == 4 && count_tiles(p, kTileShapes[tile]) > workers(p, plan))
        continue;
      const double us = estimate(p, plan).total();
      if (us < best_us) {
        best_us = us;
        best = plan;
      }
    }
  }
  return best;
}

inline std::string describe(Problem const& p, Plan const& plan) {
  const Estimate e = estimate(p, plan);
  char buffer[256];
  std::snprintf(
      buffer, sizeof buffer,
      "M=%lld N=%lld K=%lld on %d SMs, %.2f TB/s: tile %s, split_k %d; estimated %.1f us: "
      "memory %.1f, SMs %.1f, fixed %.1f; bound by %s",
      static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k),
      p.num_sms, p.memory_bytes_per_us * 1e-6, name(kTileShapes[plan.tile]).c_str(), plan.split_k,
      e.total(), e.memory, e.sm, e.fixed, e.memory >= e.sm ? "memory" : "the SMs");
  return buffer;
}

}  // namespace liquidgemm
