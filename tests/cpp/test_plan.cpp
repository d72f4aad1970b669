// The choice of plans: a pure function that always names something the kernel can run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

#include "liquidgemm/plan/cache.hpp"
#include "liquidgemm/plan/explain.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, char const* what, LaunchPlan const& launch) {
  if (condition)
    return;
  if (++failures <= 10)
    std::printf("FAILED: %s: %s\n", what, describe(launch).c_str());
}

bool is_listed(Plan const& plan) {
  return std::find(all_plans().begin(), all_plans().end(), plan) != all_plans().end();
}

// Every tile is computed once: whole by one CTA, or along K by all CTAs of a cluster.
void expect_all_tiles(LaunchPlan const& l) {
  Problem const& p = l.problem;
  Division const& d = l.division;
  const int workers = std::max(1, p.num_sms / l.plan.cluster());
  const int64_t units = int64_t(d.m_tiles) * d.n_tiles;
  const int64_t per_pair = l.plan.pairs ? 2 : 1;
  expect(int64_t(d.m_tiles) * d.tile_tokens >= p.m && d.tile_tokens <= l.plan.tile.tokens,
         "tiles cover all tokens", l);
  expect(d.n_tiles * per_pair * l.plan.tile.panels * kBlockRows >= p.n, "tiles cover all channels",
         l);
  expect(d.workers >= 1 && d.workers <= workers, "no more workers than fit", l);
  expect(d.split_tiles <= d.workers && d.split_tiles % 2 == 0, "one shared tile per pair", l);
  const int64_t whole = std::min(units, int64_t(d.whole_rounds) * d.workers);
  expect(whole * per_pair + d.split_tiles == units * per_pair, "every tile once", l);
  const double busy = busy_at_the_end(l.plan, d, p.num_sms);
  expect(busy > 0 && busy <= std::max(1.0, double(l.plan.cluster()) / p.num_sms),
         "some SMs are busy to the end", l);
}

// What is dequantized before there are tokens is part of every CTA's first tile, for every group.
void expect_weights_ahead(LaunchPlan const& l) {
  TileShape const& tile = l.plan.tile;
  expect(l.eighths_ahead >= 4 && l.eighths_ahead <= 8, "half of the ring ahead, or more", l);
  expect(l.stages_ahead >= 0 && l.stages_ahead <= tile.stages_ahead,
         "no more stages than registers hold", l);
  expect(l.stages_ahead == 0 || l.activations != Activations::kQuantizeInKernel,
         "no stages ahead in a kernel that quantizes", l);
  const int split_k = l.plan.split_k, stages = l.division.stages;
  for (int part = 0; part < split_k; ++part) {
    const int share = stages * (part + 1) / split_k - stages * part / split_k;
    expect(l.stages_ahead * tile.k_groups <= share, "no more stages ahead than there are", l);
  }
}

// A plan that was selected, not forced.
void expect_good(LaunchPlan const& l) {
  Problem const& p = l.problem;
  expect(is_listed(l.plan) && l.plan.cluster() <= p.num_sms, "a possible plan", l);
  expect(l.plan.split_k <= l.division.stages, "work for every CTA of a cluster", l);
  expect(supports(p.format, l.plan.tile, Element::kInt8), "a tile of the weights' format", l);
  expect(is_plausible(l.plan.tile, p.m, p.format), "a tile of a fitting size", l);
  expect(l.plan.split_k < 4 || l.division.whole_rounds == 1, "clusters of 4 in one round", l);
  const double us = estimate(p, l.plan, l.division, costs_of(p.format)).total();
  expect(us > 0 && std::isfinite(us), "a positive estimate", l);
  expect(l.division == divide(p, l.plan), "the division that was scored is launched", l);
  // A kernel that quantizes has the plan of a GEMM.
  const Activations scored =
      l.activations == Activations::kQuantizeInKernel ? Activations::kReady : l.activations;
  expect(l.plan.tile.ctas_per_sm == 1 || half_sm_pays(l.problem, l.plan, l.division, scored),
         "half of an SM is enough", l);
  expect(
      l.activations != Activations::kQuantizeInKernel || can_quantize_in_kernel(p.m, p.k, l.plan),
      "a kernel that can quantize", l);
  expect_all_tiles(l);
  expect_weights_ahead(l);
}

void expect_explained(Explanation const& e) {
  LaunchPlan const& l = e.launch;
  expect(e.ranking.size() == all_plans().size(), "every plan is explained", l);
  expect(e.ranking.front().plan == l.plan, "the selected plan comes first", l);
  std::set<std::string> names;
  for (Candidate const& c : e.ranking) {
    names.insert(name(c.plan));
    const bool is_winner = c.plan == l.plan;
    expect(is_winner || !why_not(c, e.ranking.front()).empty(), "every other plan has a reason", l);
    expect(c.rejection != Rejection::kNone || c.us() >= e.ranking.front().us(),
           "no plan that was scored is cheaper", l);
  }
  expect(names.size() == all_plans().size(), "every plan once", l);
}

void test_cache() {
  const auto problem = [](int64_t m) { return Problem{m, 4096, 4096, 132, 3.35e6}; };
  PlanCache cache;
  int selections = 0;
  const auto select = [&](Problem const& p) {
    ++selections;
    return select_gemm(p);
  };
  const auto get = [&](Problem const& p, int kind = 0) -> LaunchPlan const& {
    LaunchPlan const& l = cache.get(p, kind, select);
    expect(l.problem == p && l.plan == select_gemm(p).plan, "the cache returns what was asked", l);
    return l;
  };
  const LaunchPlan first = get(problem(1));
  get(problem(1));
  expect(selections == 1, "a plan is selected once", first);
  get(problem(1), 1);
  expect(selections == 2, "another kind is another plan", first);
  for (Problem p :
       {Problem{2, 4096, 4096, 132, 3.35e6}, Problem{1, 4095, 4096, 132, 3.35e6},
        Problem{1, 4096, 4095, 132, 3.35e6}, Problem{1, 4096, 4096, 131, 3.35e6},
        Problem{1, 4096, 4096, 132, 3.36e6}, Problem{1, 4096, 4096, 132, 3.35e6, FormatId::kInt8}})
    get(p);
  expect(selections == 8, "every part of a problem counts", first);
  // More problems than the cache holds, again and again.
  constexpr int64_t kProblems = 2 * PlanCache::kSets * PlanCache::kWays;
  for (int round = 0; round < 2; ++round) {
    for (int64_t m = 1; m <= kProblems; ++m)
      get(problem(m));
  }
  // What a model's layers ask for at one number of tokens after the other.
  PlanCache small;
  selections = 0;
  for (int round = 0; round < 10; ++round) {
    for (int64_t n : {1024, 4096, 6144, 14336, 28672})
      for (int64_t m : {1, 2, 4, 8, 16})
        small.get({m, n, 4096, 132, 3.35e6}, 0, select);
  }
  expect(selections == 25, "a model's problems stay", first);
}

// A new tile, whose row is there before its costs are.
void test_tile_without_costs() {
  Costs costs = kCostsOfH100;
  costs.tiles = costs.tiles.subspan(1);
  const TileShape missing = kCostsOfH100.tiles.front().tile;
  bool seen = false;
  for (int64_t m : {1, 4, 8, 64, 4096}) {
    const Problem p{m, 4096, 4096, 132, 3.35e6};
    for (Plan const& plan : all_plans()) {
      const LaunchPlan l = complete(p, plan, Activations::kReady);
      const Candidate before = candidate(p, plan, Activations::kReady);
      const Candidate c = candidate(p, plan, Activations::kReady, costs);
      const bool lost = has_same_name(plan.tile, missing) && before.rejection == Rejection::kNone;
      seen = seen || lost;
      expect(c.rejection == (lost ? Rejection::kNotMeasured : before.rejection),
             "a tile without costs is not scored, all others are as before", l);
      expect(std::isfinite(c.us()), "JSON has no infinity", l);
      expect(!lost || !why_not(c, before).empty(), "it is said why", l);
    }
  }
  expect(seen, "the tile would be scored",
         complete({1, 64, 64, 132, 3.35e6}, {missing}, Activations::kReady));
}

}  // namespace

int main() {
  for (int sms : {1, 2, 7, 16, 66, 78, 114, 132}) {
    for (int64_t n : {1, 64, 576, 4096, 28672, 151936}) {
      for (int64_t k : {1, 64, 576, 4096, 14336, 132104}) {
        for (int64_t m : {1, 2, 8, 9, 16, 17, 64, 100, 128, 256, 257, 4096, 65537}) {
          const Problem p{m, n, k, sms, 3.35e6};
          for (LaunchPlan const& l : {select_gemm(p), select_gemm(p, Activations::kJustQuantized),
                                      select_linear(p, true), select_linear(p, false)})
            expect_good(l);
          expect(select_gemm(p).launches() == 1, "a GEMM is one launch", select_gemm(p));
          expect(select_linear(p, false).launches() == 2, "unreadable x takes two launches",
                 select_linear(p, false));
          for (FormatId format :
               {FormatId::kInt8, FormatId::kLiquidQuant6, FormatId::kLiquidQuantG32}) {
            const Problem other{m, n, k, sms, 3.35e6, format};
            for (LaunchPlan const& l :
                 {select_gemm(other), select_gemm(other, Activations::kJustQuantized),
                  select_linear(other, true), select_linear(other, false)})
              expect_good(l);
          }
          for (Plan const& any : all_plans()) {
            for (Activations activations :
                 {Activations::kReady, Activations::kJustQuantized, Activations::kQuantizeInKernel})
              expect_weights_ahead(complete(p, any, activations));
            expect_all_tiles(complete(p, any, Activations::kReady));
          }
        }
        const Problem p{16, n, k, sms, 3.35e6};
        expect_explained(explain_gemm(p));
        expect_explained(explain_gemm(p, true));
        expect_explained(explain_linear(p));
        expect_explained(explain_gemm({16, n, k, sms, 3.35e6, FormatId::kInt8}));
      }
    }
  }
  test_cache();
  test_tile_without_costs();
  const Problem p{64, 4096, 4096, 132, 3.35e6};
  for (int i = 1; i < kNumTileShapes; ++i) {
    expect(kTileShapes[i - 1].tokens <= kTileShapes[i].tokens, "tiles sorted by tokens",
           complete(p, {kTileShapes[i]}, Activations::kReady));
  }
  const Plan not_measured{TileShape{64, 5, 1, 2}};
  expect(std::isinf(estimate(p, not_measured, divide(p, not_measured), kCostsOfH100).total()),
         "a tile without measured costs is never selected",
         complete(p, not_measured, Activations::kReady));
  std::printf("%s\n", failures ? "plan: FAILED" : "plan: ok");
  return failures != 0;
}
