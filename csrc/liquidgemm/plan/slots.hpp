// Which kernel runs a product of few tokens by the experts of their slots, if one can: see
// kernel/schedule/slots.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "liquidgemm/plan/cost_model.hpp"
#include "liquidgemm/plan/costs.hpp"
#include "liquidgemm/plan/rules.hpp"
#include "liquidgemm/plan/slot_plan.hpp"
#include "liquidgemm/plan/tiles.hpp"

namespace liquidgemm {

// One file each in csrc/instantiations/slots.
inline constexpr TileShape kSlotTileShapes[] = {
    {8, 1, 2, 4, 2},  // one CTA stores while the other one multiplies
    {8, 1, 4, 4},     // a longer K
};
inline constexpr int kNumSlotTileShapes = sizeof(kSlotTileShapes) / sizeof(kSlotTileShapes[0]);

inline std::vector<Plan> const& all_slot_plans() {
  static const std::vector<Plan> plans = [] {
    std::vector<Plan> result;
    for (TileShape const& tile : kSlotTileShapes) {
      for (int split : {1, 2})
        result.push_back({tile, split});
    }
    return result;
  }();
  return plans;
}

inline SlotPlan complete(SlotProblem const& p, Plan const& plan) {
  const int64_t tiles = p.slots * ceil_div(p.n, kBlockRows);
  const int64_t most = int64_t(p.num_sms) * plan.tile.ctas_per_sm / plan.cluster();
  return {p, plan, static_cast<int>(std::min(tiles, std::max<int64_t>(most, 1)))};
}

// How much longer a block takes where two CTAs share an SM.
inline constexpr double kTwoCtasOnAnSm = 1.5;

inline double estimated_us(SlotPlan const& slot_plan) {
  SlotProblem const& p = slot_plan.problem;
  Plan const& plan = slot_plan.plan;
  const TileCost cost = cost_of(costs_of(FormatId::kLiquidQuant).tiles, plan.tile);
  const int64_t panels = ceil_div(p.n, kBlockRows), blocks = ceil_div(p.k, kBlockK);
  const double rounds = std::ceil(double(p.slots * panels) / slot_plan.workers);
  const double share = slot_plan.workers * plan.cluster() > p.num_sms ? kTwoCtasOnAnSm : 1.0;
  const double split_us = plan.split_k > 1 ? cost.split_us[plan.split_k == 4] : 0;
  const Estimate estimate{
      .memory = double(std::min(p.slots, p.experts) * panels * blocks) *
                block_bytes(FormatId::kLiquidQuant) / p.memory_bytes_per_us,
      .sm = rounds * (double(blocks_per_cta(plan, ceil_div(blocks, plan.tile.stage_blocks))) *
                          cost.block_us * share +
                      cost.tile_us + split_us),
      .fixed = 0};
  return estimate.total();
}

// Of the plans with so many CTAs to an SM. None if no CTA can hold the rows.
inline std::optional<SlotPlan> select_slots(SlotProblem const& p, int ctas_per_sm) {
  std::optional<SlotPlan> best;
  double best_us = std::numeric_limits<double>::infinity();
  const int64_t all_panels = p.experts * ceil_div(p.n, kBlockRows);
  if (p.slots > kMostQuantizedTokens || all_panels >= 1 << 30 || p.experts * p.n >= 1 << 30)
    return best;
  for (Plan const& plan : all_slot_plans()) {
    const int64_t stages = ceil_div(ceil_div(p.k, kBlockK), plan.tile.stage_blocks);
    if (plan.tile.ctas_per_sm != ctas_per_sm || plan.split_k > stages ||
        plan.cluster() > p.num_sms || !can_quantize_in_kernel(p.rows, p.k, plan))
      continue;
    const SlotPlan slot_plan = complete(p, plan);
    if (const double us = estimated_us(slot_plan); us < best_us) {
      best_us = us;
      best = slot_plan;
    }
  }
  return best;
}

}  // namespace liquidgemm
