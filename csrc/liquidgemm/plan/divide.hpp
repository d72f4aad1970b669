// How a plan divides a problem: the division that is scored is the one that is launched.
#pragma once

#include <algorithm>
#include <cstdint>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/formats.hpp"
#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm {

// Counted, not fitted: clusters of four CTAs do not tile the GPCs of an H100, whose numbers of SMs
// differ: on 132 SMs 30 of them run at a time, not 33.
inline constexpr double kQuadClusterFit = 0.91;

// Clusters that run at a time. Where a CTA takes half an SM, the other half is left to the next
// launch.
inline int most_workers(int num_sms, Plan const& plan) {
  const double fit = plan.cluster() == 4 ? kQuadClusterFit : 1.0;
  return std::max(1, static_cast<int>(num_sms * fit) / plan.cluster());
}

// Rows of the swizzle pattern in which TMA stores tokens: a load begins at a whole pattern.
inline constexpr int kSwizzleRows = 8;

// Whether the CTAs of a pair share the tiles of the last round along K: if these would leave half
// of the SMs idle. Experiment: prefill.md, "Sharing loads and rounds".
inline bool shares_last_round(Plan const& plan, int last_tiles, int most_workers, int stages) {
  return plan.pairs && 2 * last_tiles <= most_workers && stages > 1;
}

inline Division divide(Problem const& p, Plan const& plan) {
  TileShape const& tile = plan.tile;
  const int most = most_workers(p.num_sms, plan);
  // Each CTA of a pair loads half of the tokens.
  const int64_t unit = plan.pairs ? 2 * kSwizzleRows : 1;
  const int64_t height = ceil_div(p.m, ceil_div(p.m, tile.tokens));
  Division d{};
  d.tile_tokens = static_cast<int>(ceil_div(height, unit) * unit);
  d.m_tiles = static_cast<int>(ceil_div(p.m, d.tile_tokens));
  d.n_tiles =
      static_cast<int>(ceil_div(ceil_div(p.n, kBlockRows), tile.panels * (plan.pairs ? 2 : 1)));
  d.stages = static_cast<int>(ceil_div(ceil_div(p.k, kBlockK), tile.stage_blocks));
  const int units = d.m_tiles * d.n_tiles;
  const int rest = units % most;
  if (shares_last_round(plan, rest, most, d.stages)) {
    d.whole_rounds = units / most;
    d.split_tiles = 2 * rest;
    d.workers = d.whole_rounds ? most : d.split_tiles;
  } else {
    d.workers = std::min(units, most);
    d.whole_rounds = static_cast<int>(ceil_div(units, d.workers));
  }
  return d;
}

// What one CTA multiplies of a tile's stages, in blocks of K.
inline int64_t blocks_per_cta(Plan const& plan, int64_t stages) {
  return ceil_div(stages, plan.split_k) * plan.tile.stage_blocks;
}

// Share of the SMs that have something to do in the last round.
inline double busy_at_the_end(Plan const& plan, Division const& d, int num_sms) {
  const double units = double(d.m_tiles) * d.n_tiles;
  const double last = d.split_tiles ? d.split_tiles : units - (d.whole_rounds - 1.0) * d.workers;
  return last * plan.cluster() / num_sms;
}

}  // namespace liquidgemm
