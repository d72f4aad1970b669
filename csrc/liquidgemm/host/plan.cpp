#include "liquidgemm/plan.hpp"

#include "liquidgemm/grouped_gemm.hpp"
#include "liquidgemm/moe.hpp"
#include "liquidgemm/plan/cache.hpp"
#include "liquidgemm/plan/explain.hpp"
#include "liquidgemm/plan/grouped.hpp"
#include "liquidgemm/plan/moe.hpp"

namespace liquidgemm {
namespace {

// One cache per thread: no lock in an eager call, and nothing that a fork could leave locked.
PlanCache& plan_cache() {
  static thread_local PlanCache cache;
  return cache;
}

enum Kind : int { kGemm, kGemmBehindProducer, kLinear, kReadableLinear };

}  // namespace

LaunchPlan plan_gemm(Problem const& problem, bool follows_producer) {
  const Activations activations =
      follows_producer ? Activations::kJustQuantized : Activations::kReady;
  return plan_cache().get(problem, follows_producer ? kGemmBehindProducer : kGemm,
                          [&](Problem const& p) { return select_gemm(p, activations); });
}

LaunchPlan plan_linear(Problem const& problem, bool x_is_readable) {
  return plan_cache().get(problem, x_is_readable ? kReadableLinear : kLinear,
                          [&](Problem const& p) { return select_linear(p, x_is_readable); });
}

GroupedPlan plan_grouped_gemm(GroupedProblem const& problem) {
  static thread_local GroupedPlanCache cache;
  return cache.get(problem, kGemm, select_grouped);
}

MoePlan plan_moe(MoeProblem const& problem) {
  return {plan_grouped_gemm(first_product(problem)), plan_grouped_gemm(second_product(problem)),
          select_by_slots(problem)};
}

bool kernel_can_read(Element x_type, void const* x) {
  return (x_type == Element::kBFloat16 || x_type == Element::kFloat16) &&
         reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

std::string to_string(LaunchPlan const& plan) {
  return describe(plan);
}

}  // namespace liquidgemm
