// Which configuration runs a problem: a pure function of the sizes and the SM count, printable and
// tested on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/quant/pack.hpp"

namespace liquidgemm {

struct Problem {
  int64_t m, n, k;
  int num_sms;
};

struct Plan {
  int tile;     // index into kTileShapes
  int split_k;  // CTAs of a cluster that share one output tile along K
};

// Estimated times of one plan, in microseconds. The constants are measured on an H100 SXM
// (bench/NOTES.md); only their ratios decide, so they serve other Hopper parts as well.
struct Estimate {
  double memory;  // streaming the weights
  double sm;      // the busiest SM: tensor cores, dequantization, its own share of L2
  double fixed;   // launch, pipeline fill, epilogue, cluster reduction
  double total() const { return std::max(memory, sm) + fixed; }
};

struct CostModel {
  double clock_ghz = 1.7;
  double memory_bytes_per_us = 3.1e6;
  double sm_memory_share = 2.5;  // how far one SM can exceed its fair share of memory bandwidth
  double sm_l2_bytes_per_cycle = 40;  // shared-memory fill rate of one SM
  double split_us = 0.9;
};

inline double block_cycles(TileShape const& s) {
  // Cycles of one SM for one 64 x 64 block of weights, dequantized and multiplied by `tokens`
  // tokens.
  const double groups_limit = s.panels * s.k_groups >= 4 ? 52 : 110;
  return std::max<double>(groups_limit, 1.06 * s.tokens);
}

inline Estimate estimate(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  TileShape const& s = kTileShapes[plan.tile];
  const int64_t panels = ceil_div(p.n, kBlockRows);
  const int64_t k_blocks = ceil_div(p.k, kBlockK);
  const int64_t slabs = ceil_div(k_blocks, s.stage_blocks);
  const int64_t tiles = ceil_div(p.m, s.tokens) * ceil_div(panels, s.panels);
  const int cluster = plan.split_k;
  const int64_t workers = std::max<int64_t>(1, p.num_sms / cluster);
  const int64_t waves = ceil_div(tiles, workers);
  const double tile_blocks = double(ceil_div(slabs, plan.split_k)) * s.stage_blocks;

  const double weight_bytes = double(panels) * k_blocks * kBlockBytes;
  const double busy = std::min<double>(p.num_sms, double(std::min(tiles, workers)) * cluster);
  const double reach = std::min(1.0, busy * c.sm_memory_share / p.num_sms);
  const double token_bytes = double(std::min<int64_t>(p.m, s.tokens)) * kBlockK;

  const double math_cycles = tile_blocks * s.panels * block_cycles(s);
  const double fill_cycles =
      tile_blocks * (s.panels * kBlockBytes + token_bytes) / c.sm_l2_bytes_per_cycle;
  const double epilogue_cycles = 300 + 12.0 * s.tokens * s.panels;
  Estimate e;
  e.memory = weight_bytes / (c.memory_bytes_per_us * reach);
  e.sm = waves * (std::max(math_cycles, fill_cycles) + epilogue_cycles) / (c.clock_ghz * 1e3);
  e.fixed = 2.2 + (plan.split_k > 1 ? c.split_us * (s.tokens > 32 ? s.tokens / 32 : 1) : 0.0);
  return e;
}

inline Plan select_plan(Problem const& p) {
  Plan best{0, 1};
  double best_us = 1e300;
  const int64_t k_blocks = ceil_div(p.k, kBlockK);
  for (int tile = 0; tile < kNumTileShapes; ++tile) {
    for (int split_k = 1; split_k <= kMaxSplitK; split_k *= 2) {
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
  std::snprintf(buffer, sizeof buffer,
                "M=%lld N=%lld K=%lld on %d SMs: tile %s, split_k %d; estimated %.1f us = "
                "max(memory %.1f, SM %.1f) + "
                "%.1f fixed: bound by %s",
                static_cast<long long>(p.m), static_cast<long long>(p.n),
                static_cast<long long>(p.k), p.num_sms, name(kTileShapes[plan.tile]).c_str(),
                plan.split_k, e.total(), e.memory, e.sm, e.fixed,
                e.memory >= e.sm ? "memory" : "the SMs");
  return buffer;
}

}  // namespace liquidgemm
