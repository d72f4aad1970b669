// Which kernels run a layer of experts: a pure function of what the host knows.
#pragma once

#include <limits>
#include <optional>

#include "liquidgemm/plan/grouped.hpp"
#include "liquidgemm/plan/moe_plan.hpp"
#include "liquidgemm/plan/slots.hpp"

namespace liquidgemm {

// A product of all experts that are here: of the slots, those whose experts are.
inline GroupedProblem product_of(MoeProblem const& p, int64_t n, int64_t k) {
  const int64_t slots = p.tokens * p.top_k;
  const bool are_spread = p.total_experts > p.experts;
  return {.rows = slots,
          .experts = p.experts,
          .n = n,
          .k = k,
          .num_sms = p.num_sms,
          .memory_bytes_per_us = p.memory_bytes_per_us,
          .format = p.format,
          .expected_rows = are_spread ? ceil_div(slots * p.experts, p.total_experts) : 0};
}
inline GroupedProblem first_product(MoeProblem const& p) {
  return product_of(p, 2 * p.inner, p.hidden);
}
inline GroupedProblem second_product(MoeProblem const& p) {
  return product_of(p, p.hidden, p.inner);
}

// None if the tokens, or what becomes of them in the first product, are too many for a CTA; and
// where experts are spread over GPUs: most slots then have no work here, and tiles are dealt out as
// if all had. CTAs of both products have half an SM each, or all of one: else those of the second
// cannot start beside those of the first. Experiment: experts.md, "Products by slots".
inline std::optional<MoePlan::BySlots> select_by_slots(MoeProblem const& p) {
  if (!p.x_is_readable || p.format != FormatId::kLiquidQuant || p.total_experts > p.experts)
    return std::nullopt;
  const int64_t slots = p.tokens * p.top_k;
  const SlotProblem first_problem{
      p.tokens, slots, p.experts, 2 * p.inner, p.hidden, p.num_sms, p.memory_bytes_per_us};
  const SlotProblem second_problem{
      slots, slots, p.experts, p.hidden, p.inner, p.num_sms, p.memory_bytes_per_us};
  std::optional<MoePlan::BySlots> best;
  double best_us = std::numeric_limits<double>::infinity();
  for (int ctas_per_sm : {1, 2}) {
    const auto first = select_slots(first_problem, ctas_per_sm);
    const auto second = select_slots(second_problem, ctas_per_sm);
    if (!first || !second)
      continue;
    if (const double us = estimated_us(*first) + estimated_us(*second); us < best_us) {
      best_us = us;
      best = MoePlan::BySlots{*first, *second};
    }
  }
  return best;
}

inline MoePlan select_moe(MoeProblem const& p) {
  return {select_grouped(first_product(p)), select_grouped(second_product(p)), select_by_slots(p)};
}

}  // namespace liquidgemm
