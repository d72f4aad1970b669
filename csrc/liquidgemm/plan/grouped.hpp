// Which kernel runs a grouped GEMM: a pure function of what the host knows. How the rows are
// distributed over experts it does not know; it takes them as drawn at random.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "liquidgemm/plan/cost_model.hpp"
#include "liquidgemm/plan/grouped_costs_h100.hpp"
#include "liquidgemm/plan/grouped_plan.hpp"

namespace liquidgemm {

// The kernels compiled for grouped GEMMs, one file each in csrc/instantiations/grouped. Sorted by
// tokens. None holds weights dequantized before there are tokens: a CTA may have no tile.
inline constexpr TileShape kGroupedTileShapes[] = {
    {8, 1, 2, 4, 2},   // decode, a short K: one CTA stores while the other one multiplies
    {16, 1, 2, 2, 2},  //
    {16, 1, 4, 4},     // a longer K
    {32, 1, 2, 2, 2},  //
    {64, 1, 3, 2},     // few panels per expert
    {64, 3, 1, 2},     // many panels share the tokens once their L2 traffic rivals the weights'
    {128, 3, 1, 2},    //
    {192, 2, 1, 2},    // prefill
    {256, 2, 1, 2},    // least dequantization per multiplication
};
inline constexpr int kNumGroupedTileShapes =
    sizeof(kGroupedTileShapes) / sizeof(kGroupedTileShapes[0]);

// Of the formats that experts can have.
template <class Format>
constexpr bool has_grouped_kernels() {
  return std::is_same_v<Format, LiquidQuant>;
}

// What random rows are expected to be.
struct ExpectedRows {
  double active;   // experts with rows
  double m_tiles;  // of all experts
};

// Above either mean per expert the distribution is left out. 16 tiles: their number is then known
// to 0.4 %. 500 rows: exp(-mean) stays a double; that costs tiles of 256 up to 10 % at 550 rows,
// and less from there on.
inline constexpr double kMostMeanTiles = 16, kMostMeanRows = 500;

// Where the distribution is cut off, above its mean: standard deviations, and rows for means near
// 0, of which a deviation says little.
inline constexpr double kDeviations = 12, kRowsBeyond = 24;

// Rows per expert are taken as Poisson distributed.
inline ExpectedRows expected_rows(int64_t rows, int64_t experts, int tile_tokens) {
  const double mean = double(rows) / double(experts);
  if (mean > kMostMeanTiles * tile_tokens || mean > kMostMeanRows) {
    // The last tile of an expert is half full, on average.
    return {double(experts), double(experts) * (mean / tile_tokens + 0.5)};
  }
  ExpectedRows expected{0, 0};
  double probability = std::exp(-mean);
  const int most = static_cast<int>(mean + kDeviations * std::sqrt(mean) + kRowsBeyond);
  for (int count = 0; count <= most; ++count) {
    expected.active += count > 0 ? probability : 0;
    expected.m_tiles += probability * static_cast<double>(ceil_div(count, tile_tokens));
    probability *= mean / (count + 1);
  }
  // At least what one expert needs.
  expected.active = std::max(1.0, expected.active * static_cast<double>(experts));
  expected.m_tiles = std::max(1.0, expected.m_tiles * static_cast<double>(experts));
  return expected;
}

// Every plan there is.
inline std::vector<Plan> const& all_grouped_plans() {
  static const std::vector<Plan> plans = [] {
    std::vector<Plan> result;
    for (TileShape const& tile : kGroupedTileShapes) {
      result.push_back({tile});
      if (!tile.can_pair())
        result.push_back({tile, 2});
    }
    return result;
  }();
  return plans;
}

// In eighths: what is filled with weights before x is there. Dense products have rules that fill
// less (rules.hpp), grouped ones have none.
inline constexpr int kWholeRing = 8;

// Everything that follows from a plan, whoever chose it.
inline GroupedPlan complete(GroupedProblem const& p, Plan const& plan) {
  TileShape const& tile = plan.tile;
  const int64_t tokens = std::min<int64_t>(tile.tokens, std::max<int64_t>(p.rows, 1));
  const int64_t n_tiles = ceil_div(ceil_div(p.n, kBlockRows), tile.panels);
  const int64_t most_tiles = (p.rows / tokens + std::min(p.rows, p.experts)) * n_tiles;
  // CTAs of half an SM work two at a time: the next launch rarely finds an SM idle anyway.
  const int64_t most_workers =
      std::max<int64_t>(1, int64_t(p.num_sms) * tile.ctas_per_sm / plan.cluster());
  return {.problem = p,
          .plan = plan,
          .tile_tokens = static_cast<int>(tokens),
          .n_tiles = static_cast<int>(n_tiles),
          .workers = static_cast<int>(std::min(most_tiles, most_workers)),
          .eighths_ahead = kWholeRing,
          .weights_are_read_once = p.likely_rows() <= p.experts * tokens};
}

// Its twin is `predictor` in bench/plan/fit_grouped.py; a test holds the two equal.
inline double estimated_us(GroupedProblem const& p, Plan const& plan, GroupedCosts const& costs) {
  TileShape const& tile = plan.tile;
  const GroupedPlan complete_plan = complete(p, plan);
  const TileCost cost = cost_of(costs.tiles, tile);
  const ExpectedRows rows = expected_rows(p.likely_rows(), p.experts, complete_plan.tile_tokens);
  const int64_t stages = ceil_div(ceil_div(p.k, kBlockK), tile.stage_blocks);
  const double rounds = std::ceil(rows.m_tiles * complete_plan.n_tiles / complete_plan.workers);
  const double tile_us = cost.tile_us + (plan.split_k > 1 ? cost.split_us[plan.split_k == 4] : 0);
  const double blocks = static_cast<double>(ceil_div(stages, plan.split_k) * tile.stage_blocks);
  const Estimate estimate{
      .memory = rows.active * double(ceil_div(p.n, kBlockRows) * ceil_div(p.k, kBlockK)) *
                block_bytes(p.format) / (p.memory_bytes_per_us * costs.memory_efficiency),
      .sm = rounds * (blocks * cost.block_us + tile_us),
      .fixed = costs.launch_us};
  return estimate.total();
}

// As many as lanes of a warp can tell apart: each has a run of experts, which are then one per
// lane.
inline constexpr int64_t kMostExperts = 32 * 32;

// Of tiles, and of channels of all experts, which are counted in 32 bits: the scheduler adds a
// round of workers to a tile before it finds that there is none.
inline constexpr int64_t kMostCounted = 1 << 30;

// Whether the scheduler can count the plan's tiles, whatever the offsets are.
inline bool is_countable(GroupedPlan const& plan) {
  GroupedProblem const& p = plan.problem;
  const int64_t m_tiles = p.experts * ceil_div(p.rows, plan.tile_tokens);
  return p.experts <= kMostExperts && m_tiles * plan.n_tiles < kMostCounted &&
         p.experts * p.n < kMostCounted;
}

inline GroupedPlan select_grouped(GroupedProblem const& p) {
  Plan best{};
  double best_us = std::numeric_limits<double>::infinity();
  for (Plan const& plan : all_grouped_plans()) {
    const int64_t stages = ceil_div(ceil_div(p.k, kBlockK), plan.tile.stage_blocks);
    if (plan.split_k > stages || plan.cluster() > p.num_sms)
      continue;
    const double us = estimated_us(p, plan, kGroupedCostsOfH100);
    if (us < best_us) {
      best_us = us;
      best = plan;
    }
  }
  return complete(p, best);
}

}  // namespace liquidgemm
