// The heuristic: a pure function that always names something the kernel can run.
#include <algorithm>
#include <cstdio>
#include <iterator>

#include "liquidgemm/host/plan.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, char const* what, Problem const& p, Plan const& plan) {
  if (condition)
    return;
  if (++failures <= 10)
    std::printf("FAILED: %s: %s\n", what, describe(p, plan).c_str());
}

bool valid_split(int split_k) {
  return std::find(std::begin(kSplits), std::end(kSplits), split_k) != std::end(kSplits);
}

}  // namespace

int main() {
  for (int sms : {1, 2, 7, 16, 66, 78, 114, 132}) {
    for (int64_t n : {1, 64, 576, 4096, 28672, 151936}) {
      for (int64_t k : {1, 64, 576, 4096, 14336, 132104}) {
        for (int64_t m : {1, 2, 8, 9, 16, 17, 64, 100, 128, 256, 257, 4096, 65537}) {
          const Problem p{m, n, k, sms, 3.35e6};
          const Plan plan = select_plan(p);
          expect(plan.tile >= 0 && plan.tile < kNumTileShapes, "a compiled tile", p, plan);
          expect(valid_split(plan.split_k) && plan.split_k <= sms, "a possible split", p, plan);
          const int64_t slabs = ceil_div(ceil_div(k, kBlockK), kTileShapes[plan.tile].stage_blocks);
          expect(plan.split_k <= slabs, "work for every CTA of a cluster", p, plan);
          expect(is_plausible(kTileShapes[plan.tile], m), "a tile of a fitting size", p, plan);
          expect(plan.split_k < 4 || count_tiles(p, kTileShapes[plan.tile]) <= workers(p, plan),
                 "clusters of 4 in one wave", p, plan);
          expect(estimate(p, plan).total() > 0, "a positive estimate", p, plan);
        }
      }
    }
  }
  for (int i = 1; i < kNumTileShapes; ++i) {
    expect(kTileShapes[i - 1].tokens <= kTileShapes[i].tokens, "tiles sorted by tokens", {},
           {i, 1});
  }
  std::printf("%s\n", failures ? "plan: FAILED" : "plan: ok");
  return failures != 0;
}
