// Every plan there is: each tile with each way in which CTAs can share its work.
#pragma once

#include <vector>

#include "liquidgemm/plan/launch_plan.hpp"
#include "liquidgemm/plan/tiles.hpp"

namespace liquidgemm {

// See kernel/schedule/dense.hpp.
inline std::vector<Plan> const& all_plans() {
  static const std::vector<Plan> plans = [] {
    std::vector<Plan> result;
    for (TileShape const& tile : kTileShapes) {
      if (tile.can_pair()) {
        result.push_back({tile});
        if (tile.tokens >= 64)  // below, it is the weights that are loaded
          result.push_back({tile, 1, true});
      } else {
        for (int split_k : kSplits)
          result.push_back({tile, split_k});
      }
    }
    return result;
  }();
  return plans;
}

}  // namespace liquidgemm
