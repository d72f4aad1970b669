// What a launch of a product by slots is: everything that is decided before it.
#pragma once

#include <cstdint>
#include <string>

#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm {

struct SlotProblem {
  int64_t rows;                // of x
  int64_t slots;               // rows of y
  int64_t experts, n, k;       // every expert is [n, k]
  int num_sms;                 // at most so many are used
  double memory_bytes_per_us;  // peak of the GPU

  friend bool operator==(SlotProblem const&, SlotProblem const&) = default;
};

// Complete: what launches it decides nothing.
struct SlotPlan {
  SlotProblem problem;
  Plan plan;
  int workers;  // CTAs, or clusters of them
};

inline std::string describe(SlotPlan const& plan) {
  SlotProblem const& p = plan.problem;
  return std::to_string(p.slots) + " slots, E = " + std::to_string(p.experts) +
         ", N = " + std::to_string(p.n) + ", K = " + std::to_string(p.k) + " on " +
         std::to_string(p.num_sms) + " SMs: plan " + name(plan.plan) + ", " +
         std::to_string(plan.workers) + " workers";
}

}  // namespace liquidgemm
