// The heuristic: a pure function that always names something the kernel can run.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "liquidgemm/plan/early_weights.hpp"
#include "liquidgemm/plan/plan.hpp"

using namespace liquidgemm;

static_assert(supports<LiquidQuant>({8, 1, 4, 4, 1, 2}, Element::kInt8));
static_assert(supports<LiquidQuant>({8, 1, 4, 4, 1, 2}, Element::kBFloat16));
static_assert(!supports<LiquidQuant>({8, 1, 4, 4, 1, 2}, Element::kFloat32));
static_assert(supports<LiquidQuant>({128, 2, 1, 2}, Element::kInt8));
static_assert(!supports<LiquidQuant>({128, 2, 1, 2}, Element::kBFloat16));  // too many tokens
static_assert(!supports<LiquidQuant>({64, 5, 1, 2}, Element::kInt8));       // not listed

namespace {

int failures = 0;

void expect(bool condition, char const* what, Problem const& p, Plan const& plan) {
  if (condition)
    return;
  if (++failures <= 10)
    std::printf("FAILED: %s: %s\n", what, describe(p, plan).c_str());
}

bool is_listed(Plan const& plan) {
  return std::any_of(all_plans().begin(), all_plans().end(),
                     [&](Plan const& listed) { return name(listed) == name(plan); });
}

// Every tile is computed once: whole by one CTA, or along K by all CTAs of a cluster.
void expect_all_tiles(Problem const& p, Plan const& plan, int workers) {
  const Division d = divide(p.m, p.n, p.k, plan, workers);
  TileShape const& shape = plan.tile;
  const int64_t units = int64_t(d.m_tiles) * d.n_tiles;
  const int64_t per_pair = plan.pairs ? 2 : 1;
  expect(int64_t(d.m_tiles) * d.tile_tokens >= p.m && d.tile_tokens <= shape.tokens,
         "tiles cover all tokens", p, plan);
  expect(d.n_tiles * per_pair * shape.panels * kBlockRows >= p.n, "tiles cover all channels", p,
         plan);
  expect(d.workers >= 1 && d.workers <= workers, "no more workers than fit", p, plan);
  expect(d.split_tiles <= d.workers && d.split_tiles % 2 == 0, "one shared tile per pair", p, plan);
  const int64_t whole = std::min(units, int64_t(d.whole_rounds) * d.workers);
  expect(whole * per_pair + d.split_tiles == units * per_pair, "every tile once", p, plan);
}

// What is dequantized before there are tokens is part of every CTA's first tile, for every group.
void expect_weights_ahead(Problem const& p, Plan const& plan, bool x_is_new) {
  TileShape const& shape = plan.tile;
  const Division d = divide(p.m, p.n, p.k, plan, plan.workers(p.num_sms));
  const int eighths = eighths_ahead(plan, d, p.num_sms, false, x_is_new);
  expect(eighths >= 4 && eighths <= 8, "half of the ring ahead, or more", p, plan);
  const int stages = stages_ahead(plan, d, p.num_sms, false, x_is_new);
  expect(stages >= 0 && stages <= shape.stages_ahead, "no more stages than registers hold", p,
         plan);
  for (int part = 0; part < plan.split_k; ++part) {
    const int share = d.stages * (part + 1) / plan.split_k - d.stages * part / plan.split_k;
    expect(stages * shape.k_groups <= share, "no more stages ahead than there are", p, plan);
  }
}

void expect_good(Problem const& p, Plan const& plan, bool x_is_new) {
  expect(is_listed(plan.tile), "a compiled tile", p, plan);
  expect(is_listed(plan) && plan.cluster() <= p.num_sms, "a possible plan", p, plan);
  const Division d = divide(p, plan);
  expect(plan.split_k <= d.stages, "work for every CTA of a cluster", p, plan);
  expect(is_plausible(plan.tile, p.m), "a tile of a fitting size", p, plan);
  expect(plan.split_k < 4 || d.whole_rounds == 1, "clusters of 4 in one round", p, plan);
  expect(estimate(p, plan, d).total() > 0, "a positive estimate", p, plan);
  const double busy = busy_at_the_end(plan, d, p.num_sms);
  expect(busy > 0 && busy <= 1, "some SMs are busy to the end", p, plan);
  expect(plan.tile.ctas_per_sm == 1 || fits_half_sm(plan, d, x_is_new), "half of an SM is enough",
         p, plan);
  if (fits_quantized(p.m, p.k, plan)) {
    const int eighths = eighths_ahead(plan, d, p.num_sms, true, true);
    expect(eighths >= 4 && eighths <= 8, "half of the ring ahead, or more", p, plan);
  }
}

}  // namespace

int main() {
  for (int sms : {1, 2, 7, 16, 66, 78, 114, 132}) {
    for (int64_t n : {1, 64, 576, 4096, 28672, 151936}) {
      for (int64_t k : {1, 64, 576, 4096, 14336, 132104}) {
        for (int64_t m : {1, 2, 8, 9, 16, 17, 64, 100, 128, 256, 257, 4096, 65537}) {
          const Problem p{m, n, k, sms, 3.35e6};
          for (bool x_is_new : {false, true})
            expect_good(p, select_plan(p, x_is_new), x_is_new);
          for (Plan const& any : all_plans()) {
            expect_all_tiles(p, any, std::max(1, sms / any.cluster()));
            for (bool x_is_new : {false, true})
              expect_weights_ahead(p, any, x_is_new);
          }
        }
      }
    }
  }
  for (int i = 1; i < kNumTileShapes; ++i) {
    expect(kTileShapes[i - 1].tokens <= kTileShapes[i].tokens, "tiles sorted by tokens", {},
           {kTileShapes[i]});
    for (int j = 0; j < i; ++j)
      expect(!has_same_name(kTileShapes[i], kTileShapes[j]), "one name, one tile", {},
             {kTileShapes[i]});
  }
  const Problem p{64, 4096, 4096, 132, 3.35e6};
  const Plan not_measured{TileShape{64, 5, 1, 2}};
  expect(std::isinf(estimate(p, not_measured, divide(p, not_measured)).total()),
         "a tile without measured costs is never selected", p, not_measured);
  std::printf("%s\n", failures ? "plan: FAILED" : "plan: ok");
  return failures != 0;
}
