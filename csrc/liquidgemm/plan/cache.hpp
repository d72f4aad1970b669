// Plans that were selected before. A selection scores some fifty plans, and a model asks for the
// same few problems again and again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm {

// A bounded set-associative cache: the oldest plan of a full set makes room. Not shared between
// threads; see host/plan.cpp.
class PlanCache {
 public:
  // What `select` returns for this problem, now or at an earlier call with the same key. `kind`
  // tells apart the ways to select.
  template <class Select>
  LaunchPlan const& get(Problem const& problem, int kind, Select&& select) {
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
    LaunchPlan plan{};
  };
  struct Set {
    std::array<Entry, kWays> entries;
    size_t oldest = 0;
  };

  // Mixes by multiplication with an odd constant, whose best bits are the upper ones.
  static size_t hash(Problem const& p, int kind) {
    uint64_t h = 0;
    for (int64_t value : {p.m, p.n, p.k, int64_t{p.num_sms}, int64_t{kind}})
      h = (h ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    return h >> 32;
  }

  std::array<Set, kSets> sets_;
};

}  // namespace liquidgemm
