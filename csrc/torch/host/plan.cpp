// What liquidgemm/ops/plans.py asks: which plans there are, and why one is selected.
#include <cstdio>

#include "../check.hpp"
#include "liquidgemm/plan/explain.hpp"
#include "liquidgemm/plan/moe.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {
namespace {

FormatId format_named(std::string const& name) {
  for (size_t i = 0; i < std::tuple_size_v<Formats>; ++i) {
    const FormatId id = static_cast<FormatId>(i);
    if (name == visit_format(id, [](auto format) { return decltype(format)::type::kName; }))
      return id;
  }
  fail("format: expected the name of a weight format, got '", name, "'");
}

}  // namespace

std::vector<std::string> plan_names() {
  std::vector<std::string> names;
  for (Plan const& plan : all_plans())
    names.push_back(name(plan));
  return names;
}

std::vector<int64_t> plausible_plans(int64_t m, std::string format) {
  const FormatId id = format_named(format);
  std::vector<int64_t> plans;
  for (size_t i = 0; i < all_plans().size(); ++i) {
    TileShape const& tile = all_plans()[i].tile;
    if (supports(id, tile, Element::kInt8) && (m == 0 || is_plausible(tile, m, id)))
      plans.push_back(static_cast<int64_t>(i));
  }
  return plans;
}

std::vector<std::string> grouped_plan_names() {
  std::vector<std::string> names;
  for (Plan const& plan : all_grouped_plans())
    names.push_back(name(plan));
  return names;
}

std::string grouped_plan(
    int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t num_sms, double memory_tbps) {
  for (auto const& [name, value] :
       {std::pair{"rows", rows}, {"experts", experts}, {"n", n}, {"k", k}, {"num_sms", num_sms}})
    check(value >= 1 && value <= INT32_MAX, name, ": expected 1 to 2^31 - 1, got ", value);
  check(memory_tbps > 0, "memory_tbps: expected a positive number, got ", memory_tbps);
  const GroupedProblem problem{rows, experts, n, k, static_cast<int>(num_sms), memory_tbps * 1e6};
  const GroupedPlan plan = select_grouped(problem);
  char us[32];
  std::snprintf(us, sizeof us, "%.4g", estimated_us(problem, plan.plan, kGroupedCostsOfH100));
  return describe(plan) + ", estimated " + us + " us";
}

std::vector<std::string> slot_plan_names() {
  std::vector<std::string> names;
  for (Plan const& plan : all_slot_plans())
    names.push_back(name(plan));
  return names;
}

std::string moe_plan(int64_t tokens,
                     int64_t top_k,
                     int64_t experts,
                     int64_t total_experts,
                     int64_t hidden,
                     int64_t inner,
                     bool of_16_bits,
                     int64_t num_sms,
                     double memory_tbps) {
  for (auto const& [name, value] : {std::pair{"tokens", tokens},
                                    {"top_k", top_k},
                                    {"experts", experts},
                                    {"total_experts", total_experts},
                                    {"hidden", hidden},
                                    {"inner", inner},
                                    {"num_sms", num_sms}})
    check(value >= 1 && value <= INT32_MAX, name, ": expected 1 to 2^31 - 1, got ", value);
  check(total_experts >= experts, "total_experts: expected at least the ", experts,
        " experts here, got ", total_experts);
  check(memory_tbps > 0, "memory_tbps: expected a positive number, got ", memory_tbps);
  return describe(select_moe({.tokens = tokens,
                              .top_k = top_k,
                              .experts = experts,
                              .hidden = hidden,
                              .inner = inner,
                              .num_sms = static_cast<int>(num_sms),
                              .memory_bytes_per_us = memory_tbps * 1e6,
                              .total_experts = total_experts,
                              .x_is_readable = of_16_bits}));
}

std::string explain_plan(int64_t m,
                         int64_t n,
                         int64_t k,
                         std::string op,
                         std::string format,
                         int64_t num_sms,
                         double memory_tbps) {
  for (auto const& [name, value] : {std::pair{"m", m}, {"n", n}, {"k", k}, {"num_sms", num_sms}})
    check(value >= 1 && value <= INT32_MAX, name, ": expected 1 to 2^31 - 1, got ", value);
  check(memory_tbps > 0, "memory_tbps: expected a positive number, got ", memory_tbps);
  const Problem problem{
      m, n, k, static_cast<int>(num_sms), memory_tbps * 1e6, format_named(format)};
  return to_json(op == "linear" ? explain_linear(problem)
                                : explain_gemm(problem, op == "gemm_behind_producer"));
}

}  // namespace liquidgemm::binding
