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
// and everything that a tile costs beside its blocks (pipeline fill, epilogue).
struct TileCost {
  double block_us, tile_us;
};

// All constants come from bench/fit_plan.py and a sweep over every plan on an H200, whose SMs are
// those of an H100; the memory's bandwidth is asked of the GPU.
inline constexpr TileCost kTileCosts[] = {
    {0.0459, 1.081},  // t8_p1_k4
    {0.0468, 1.093},  // t16_p1_k4
    {0.0621, 1.017},  // t32_p1_k4
    {0.0790, 1.392},  // t64_p1_k4
    {0.2597, 2.301},  // t64_p4_k1
    {0.1821, 1.852},  // t128_p2_k1
    {0.2584, 2.104},  // t128_p3_k1
    {0.3546, 2.304},  // t128_p4_k1
    {0.3141, 2.702},  // t256_p2_k1
};
static_assert(sizeof(kTileCosts) / sizeof(kTileCosts[0]) == kNumTileShapes);

struct CostModel {
  double launch_us = 0.6093;
  double occupancy_us = 1.109;        // a launch that leaves SMs idle overlaps with the next one
  double memory_efficiency = 0.9821;  // of the peak
  double sm_memory_share = 2.538;     // how far one SM can exceed its fair share of the bandwidth
  double split_us[3] = {0, 0.1132, 0.1951};  // per tile, for 1, 2 and 4 CTAs along K
  double split_per_octet = 1.289;            // and more with every 8 tokens, relative to split_us
  double quad_cluster_fit = 0.91;            // clusters of 4 do not tile the GPCs
};
// Time of one plan, in microseconds: the larger of streaming the weights and of what the busiest SM
// has to do (softly: near the crossover the two get in each other's way), and what is fixed.
struct Estimate {
  double memory, sm, fixed;
  double total() const { return fixed + std::pow(std::pow(memory, 6) + std::pow(sm, 6), 1.0 / 6); }
};

inline Estimate estimate(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  TileShape const& shape = kTileShapes[plan.tile];
  TileCost const& cost = kTileCosts[plan.tile];
  const int log2_split = plan.split_k == 1 ? 0 : plan.split_k == 2 ? 1 : 2;
  const double panels = ceil_div(p.n, kBlockRows);
  const double k_blocks = ceil_div(p.k, kBlockK);
  const double slabs = std::ceil(k_blocks / shape.stage_blocks);
  const double tiles = ceil_div(p.m, shape.tokens) * std::ceil(panels / shape.panels);
  const double fit = log2_split == 2 ? c.quad_cluster_fit : 1.0;
  const double workers = std::max(1.0, std::floor(p.num_sms * fit / plan.split_k));
  const double waves = std::ceil(tiles / workers);
  const double last_wave = tiles - (waves - 1) * workers;
  const double tokens = std::min<double>(p.m, shape.tokens);

  // A last wave on few SMs cannot use all of the bandwidth.
  const double last_reach = std::min(1.0, last_wave * plan.split_k * c.sm_memory_share / p.num_sms);
  const double blocks = std::ceil(slabs / plan.split_k) * shape.stage_blocks;
  const double busy = std::min<double>(p.num_sms, std::min(tiles, workers) * plan.split_k);
  Estimate e;
  e.memory = panels * k_blocks * kBlockBytes / (p.memory_bytes_per_us * c.memory_efficiency) *
             ((tiles - last_wave) + last_wave / last_reach) / tiles;
  e.sm = waves * (blocks * cost.block_us + cost.tile_us * (1 + tokens / shape.tokens) / 2 +
                  c.split_us[log2_split] * (1 + c.split_per_octet * tokens / 8));
  e.fixed = c.launch_us + c.occupancy_us * busy / p.num_sms;
  return e;
}

// Tiles far too large or too small for m tokens were not measured (bench/plan_sweep.py has the same
// rule): the estimate says nothing of
// them.
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
