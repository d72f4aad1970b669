// Which plan runs a problem: a pure function, tested on a CPU.
#pragma once

#include <cstdint>
#include <limits>

#include "liquidgemm/plan/all_plans.hpp"
#include "liquidgemm/plan/cost_model.hpp"
#include "liquidgemm/plan/costs.hpp"
#include "liquidgemm/plan/rules.hpp"

namespace liquidgemm {

// The rule by which a plan is not even scored.
enum class Rejection {
  kNone,
  kNotCompiled,
  kImplausible,
  kLargerThanGpu,
  kTooFewStages,
  kQuadInSeveralRounds,
  kHalfSmDoesNotPay,
  kShouldShareK,
  kNotMeasured,
};

// A plan beside the others. Without a rejection it costs `us()`.
struct Candidate {
  Plan plan;
  Division division;
  Rejection rejection;
  Estimate estimate;
  double behind_quantizer_us;

  double us() const { return estimate.total() + behind_quantizer_us; }
};

inline Candidate candidate(Problem const& p,
                           Plan const& plan,
                           Activations activations,
                           Costs const& costs) {
  Candidate c{};
  c.plan = plan;
  c.rejection = !supports(p.format, plan.tile, Element::kInt8) ? Rejection::kNotCompiled
                : !is_plausible(plan.tile, p.m, p.format)      ? Rejection::kImplausible
                : plan.cluster() > p.num_sms                   ? Rejection::kLargerThanGpu
                                                               : Rejection::kNone;
  if (c.rejection != Rejection::kNone)
    return c;
  c.division = divide(p, plan);
  if (plan.split_k > c.division.stages)
    c.rejection = Rejection::kTooFewStages;
  else if (is_quad_in_several_rounds(plan, c.division))
    c.rejection = Rejection::kQuadInSeveralRounds;
  else if (plan.tile.ctas_per_sm > 1 && !half_sm_pays(p, plan, c.division, activations))
    c.rejection = Rejection::kHalfSmDoesNotPay;
  else if (should_share_k(p, plan, c.division))
    c.rejection = Rejection::kShouldShareK;
  else if (!costs.knows(plan.tile))
    c.rejection = Rejection::kNotMeasured;
  if (c.rejection != Rejection::kNone)
    return c;
  c.estimate = estimate(p, plan, c.division, costs);
  if (activations == Activations::kJustQuantized)
    c.behind_quantizer_us = us_behind_quantizer(p, plan, c.division);
  return c;
}
inline Candidate candidate(Problem const& p, Plan const& plan, Activations activations) {
  return candidate(p, plan, activations, costs_of(p.format));
}

// The cheapest plan; of plans that cost the same, the first.
inline Plan select_plan(Problem const& p, Activations activations) {
  Plan best{};
  double best_us = std::numeric_limits<double>::infinity();
  for (Plan const& plan : all_plans()) {
    const Candidate c = candidate(p, plan, activations);
    if (c.rejection == Rejection::kNone && c.us() < best_us) {
      best_us = c.us();
      best = plan;
    }
  }
  return best;
}

// Everything that follows from a plan, whoever chose it.
inline LaunchPlan complete(Problem const& p, Plan const& plan, Activations activations) {
  const Division d = divide(p, plan);
  return {.problem = p,
          .activations = activations,
          .plan = plan,
          .division = d,
          .eighths_ahead = eighths_ahead(plan, d, p.num_sms, activations),
          .stages_ahead = stages_ahead(plan, d, p.num_sms, activations)};
}

// For a GEMM of int8 activations that an earlier kernel wrote, or with kJustQuantized the one that
// is launched right before.
inline LaunchPlan select_gemm(Problem const& p, Activations activations = Activations::kReady) {
  return complete(p, select_plan(p, activations), activations);
}

// For a linear layer. `x_is_readable`: whether a kernel could read the activations as they are, to
// quantize them: 16 bits, rows without gaps, aligned to 16 bytes.
inline LaunchPlan select_linear(Problem const& p, bool x_is_readable) {
  if (x_is_readable && p.m <= kMostQuantizedTokens) {
    const Plan plan = select_plan(p, Activations::kReady);
    if (can_quantize_in_kernel(p.m, p.k, plan) &&
        pays_to_quantize_in_kernel(p, plan, divide(p, plan)))
      return complete(p, plan, Activations::kQuantizeInKernel);
  }
  return complete(p, select_plan(p, Activations::kJustQuantized), Activations::kJustQuantized);
}

}  // namespace liquidgemm
