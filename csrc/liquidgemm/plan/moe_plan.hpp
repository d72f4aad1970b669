// What the launches of a layer of experts are: everything that is decided before them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "liquidgemm/plan/grouped_plan.hpp"
#include "liquidgemm/plan/slot_plan.hpp"

namespace liquidgemm {

struct MoeProblem {
  int64_t tokens, top_k, experts, hidden, inner;
  int num_sms;  // at most so many are used
  double memory_bytes_per_us;
  FormatId format = FormatId::kLiquidQuant;  // of every expert
  int64_t total_experts = 0;  // of all GPUs, of which `experts` are here; 0: all of them are
  // Whether a kernel could read x as it is, to quantize it: 16 bits, aligned to 16 bytes.
  bool x_is_readable;
};

// Of the grouped products, which have top_k * tokens rows; and of the products by slots that take
// their places for very few tokens: three launches instead of six.
struct MoePlan {
  struct BySlots {
    SlotPlan first, second;
  };

  GroupedPlan first, second;
  std::optional<BySlots> by_slots;

  int launches() const { return by_slots ? 3 : 6; }
};

inline std::string describe(MoePlan const& plan) {
  const std::string launches = std::to_string(plan.launches()) + " launches: ";
  return launches + (plan.by_slots ? describe(plan.by_slots->first) + "; then " +
                                         describe(plan.by_slots->second)
                                   : describe(plan.first) + "; then " + describe(plan.second));
}

}  // namespace liquidgemm
