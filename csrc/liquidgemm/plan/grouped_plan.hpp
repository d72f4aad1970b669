// What a launch of a grouped GEMM is: everything that is decided before it.
#pragma once

#include <cstdint>
#include <string>

#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm {

struct GroupedProblem {
  int64_t rows;                              // of all experts, at most
  int64_t experts, n, k;                     // every expert is [n, k]
  int num_sms;                               // at most so many are used
  double memory_bytes_per_us;                // peak of the GPU
  FormatId format = FormatId::kLiquidQuant;  // of every expert
  // How many rows are expected: fewer than there may be where experts are spread over GPUs. 0: all.
  int64_t expected_rows = 0;

  int64_t likely_rows() const { return expected_rows > 0 ? expected_rows : rows; }

  friend bool operator==(GroupedProblem const&, GroupedProblem const&) = default;
};

// Complete: what launches it decides nothing.
struct GroupedPlan {
  GroupedProblem problem;
  Plan plan;
  int tile_tokens;  // height of a tile, the last one of an expert excepted
  int n_tiles;
  int workers;  // CTAs, or clusters of them
  int eighths_ahead;
  bool weights_are_read_once;  // by most experts
};

inline std::string describe(GroupedPlan const& plan) {
  GroupedProblem const& p = plan.problem;
  const std::string of = p.expected_rows > 0 ? std::to_string(p.expected_rows) + " of " : "";
  return "R = " + of + std::to_string(p.rows) + ", E = " + std::to_string(p.experts) +
         ", N = " + std::to_string(p.n) + ", K = " + std::to_string(p.k) + " on " +
         std::to_string(p.num_sms) + " SMs: plan " + name(plan.plan) + ", " +
         std::to_string(plan.workers) + " workers";
}

}  // namespace liquidgemm
