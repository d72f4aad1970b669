// Plans that were selected before. A selection scores some fifty plans, and a model repeats the
// same few problems.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "liquidgemm/plan/grouped_plan.hpp"

namespace liquidgemm {

inline std::array<int64_t, 4> sizes_of(Problem const& p) {
  return {p.m, p.n, p.k, p.num_sms};
}
inline std::array<int64_t, 5> sizes_of(GroupedProblem const& p) {
  return {p.rows, p.experts, p.n, p.k, p.num_sms};
}

// A bounded set-associative cache: the oldest plan of a full set makes room. Not shared between
// threads; see host/plan.cpp.
template <class Problem, class Plan>
class CacheOf {
 public:
  // What `select` returns for this problem, now or at an earlier call with the same key. `kind`
  // tells apart the ways to select.
  template <class Select>
  Plan const& get(Problem const& problem, int kind, Select&& select) {
    Set& set = sets_[hash(problem, kind) % kSets];
    for (Entry const& entry : set.entries) {
      if (entry.kind == kind && entry.plan.problem == problem)
        return entry.plan;
    }
    Entry& entry = set.entries[set.oldest];
    set.oldest = (set.oldest + 1) % kWays;
    entry = {kind, select(problem)};
    return entry.plan;
  }

  static constexpr size_t kSets = 64, kWays = 4;

 private:
  struct Entry {
    int kind = -1;
    Plan plan{};
  };
  struct Set {
    std::array<Entry, kWays> entries;
    size_t oldest = 0;
  };

  // Mixes by multiplication with an odd constant, whose best bits are the upper ones.
  static size_t hash(Problem const& p, int kind) {
    uint64_t h = 0;
    for (int64_t value : sizes_of(p))
      h = mix(h, value);
    return mix(h, kind) >> 32;
  }

  static uint64_t mix(uint64_t h, int64_t value) {
    return (h ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
  }

  std::array<Set, kSets> sets_;
};

using PlanCache = CacheOf<Problem, LaunchPlan>;
using GroupedPlanCache = CacheOf<GroupedProblem, GroupedPlan>;

}  // namespace liquidgemm
