// Why a plan was selected, and why each of the others was not: for people, in words and numbers.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "liquidgemm/plan/select.hpp"

namespace liquidgemm {

inline char const* in_words(Rejection rejection) {
  switch (rejection) {
    case Rejection::kNone:
      return "";
    case Rejection::kNotCompiled:
      return "its tile is not compiled for weights of this format";
    case Rejection::kImplausible:
      return "its tile is far too large or too small for so many tokens";
    case Rejection::kLargerThanGpu:
      return "its cluster has more CTAs than the GPU has SMs";
    case Rejection::kTooFewStages:
      return "K has fewer pipeline stages than the cluster has CTAs";
    case Rejection::kQuadInSeveralRounds:
      return "clusters of four CTAs would take several rounds";
    case Rejection::kHalfSmDoesNotPay:
      return "CTAs of half an SM would have too much to read, or take several rounds";
    case Rejection::kShouldShareK:
      return "half of the SMs would be idle while each CTA reads more than its ring holds";
    case Rejection::kNotMeasured:
      return "the costs of its tile are not measured: see bench sweep and bench fit";
  }
  return "";
}

inline char const* in_words(Activations activations) {
  switch (activations) {
    case Activations::kReady:
      return "activations ready";
    case Activations::kJustQuantized:
      return "behind a quantizer";
    case Activations::kQuantizeInKernel:
      return "one launch, which quantizes";
  }
  return "";
}

namespace plan_detail {

template <class... Values>
std::string format(char const* pattern, Values... values) {
  const int length = std::snprintf(nullptr, 0, pattern, values...);
  std::string text(length, '\0');
  std::snprintf(text.data(), length + 1, pattern, values...);
  return text;
}

}  // namespace plan_detail

// All plans: those that were scored, cheapest first, then those that a rule rejects.
inline std::vector<Candidate> ranking(Problem const& p, Activations activations) {
  std::vector<Candidate> result;
  for (Plan const& plan : all_plans())
    result.push_back(candidate(p, plan, activations));
  std::stable_sort(result.begin(), result.end(), [](Candidate const& a, Candidate const& b) {
    const bool scored = a.rejection == Rejection::kNone, other = b.rejection == Rejection::kNone;
    return scored != other ? scored : scored && a.us() < b.us();
  });
  return result;
}

// Why `c` comes after the winner: the rule that rejects it, or the largest part of its estimate
// that exceeds the winner's.
inline std::string why_not(Candidate const& c, Candidate const& winner) {
  using plan_detail::format;
  if (c.rejection != Rejection::kNone)
    return in_words(c.rejection);
  const double sm = c.estimate.sm - winner.estimate.sm;
  const double fixed = c.estimate.fixed - winner.estimate.fixed;
  const double behind = c.behind_quantizer_us - winner.behind_quantizer_us;
  if (std::max({sm, fixed, behind}) <= 0)
    return "costs as much as the selected plan, which is listed before it";
  if (sm >= fixed && sm >= behind)
    return format("its busiest SM works %.2f us, that of the selected plan %.2f", c.estimate.sm,
                  winner.estimate.sm);
  if (fixed >= behind)
    return format("its last round leaves less room to the next launch: %.2f us, not %.2f",
                  c.estimate.fixed, winner.estimate.fixed);
  return format("behind a quantizer it waits %.2f us, the selected plan %.2f",
                c.behind_quantizer_us, winner.behind_quantizer_us);
}

// What `explain_gemm` and `explain_linear` tell of a selection.
struct Explanation {
  LaunchPlan launch;
  int launches;              // of the op
  std::string why_launches;  // why one launch, or two
  std::vector<Candidate> ranking;
};

inline Explanation explain_gemm(Problem const& p, bool follows_producer = false) {
  const Activations activations =
      follows_producer ? Activations::kJustQuantized : Activations::kReady;
  return {
      select_gemm(p, activations), 1,
      follows_producer ? "the kernel before writes the activations" : "the activations are there",
      ranking(p, activations)};
}

// Of a linear layer whose activations a kernel can read.
inline Explanation explain_linear(Problem const& p) {
  const LaunchPlan launch = select_linear(p, true);
  if (launch.activations == Activations::kQuantizeInKernel) {
    return {
        launch, 1,
        launch.plan.tile.ctas_per_sm > 1
            ? "the kernel quantizes: there is little to read, and CTAs of half an SM start early"
            : "the kernel quantizes: with several tiles per CTA, reading x is hidden",
        ranking(p, Activations::kReady)};
  }
  const Plan alone = select_plan(p, Activations::kReady);
  return {launch, 2,
          p.m > kMostQuantizedTokens ? "no kernel quantizes so many tokens"
          : !can_quantize_in_kernel(p.m, p.k, alone)
              ? "the kernel cannot hold the activations, or K is no multiple of 8"
              : "a quantizer before the kernel is faster",
          ranking(p, Activations::kJustQuantized)};
}

// One line about a launch, whatever its plan.
inline std::string describe(LaunchPlan const& launch) {
  Problem const& p = launch.problem;
  const Estimate e = estimate(p, launch.plan, launch.division, costs_of(p.format));
  return plan_detail::format(
      "M=%lld N=%lld K=%lld on %d SMs, %.2f TB/s: plan %s, %s; estimated %.1f us: memory %.1f, "
      "SMs %.1f, fixed %.1f; bound by %s",
      static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k),
      p.num_sms, p.memory_bytes_per_us * 1e-6, name(launch.plan).c_str(),
      in_words(launch.activations), e.total(), e.memory, e.sm, e.fixed,
      e.memory >= e.sm ? "memory" : "the SMs");
}

// For liquidgemm/ops/plans.py. The texts hold no character that JSON would escape.
inline std::string to_json(Explanation const& explanation) {
  using plan_detail::format;
  LaunchPlan const& launch = explanation.launch;
  Division const& d = launch.division;
  std::string json = format(
      "{\"plan\": \"%s\", \"launches\": %d, \"why_launches\": \"%s\", \"tile_tokens\": %d, "
      "\"m_tiles\": %d, \"n_tiles\": %d, \"workers\": %d, \"cluster\": %d, \"whole_rounds\": %d, "
      "\"split_tiles\": %d, \"eighths_ahead\": %d, \"stages_ahead\": %d, \"candidates\": [",
      name(launch.plan).c_str(), explanation.launches, explanation.why_launches.c_str(),
      d.tile_tokens, d.m_tiles, d.n_tiles, d.workers, launch.plan.cluster(), d.whole_rounds,
      d.split_tiles, launch.eighths_ahead, launch.stages_ahead);
  Candidate const& winner = explanation.ranking.front();
  for (Candidate const& c : explanation.ranking) {
    const std::string why = c.plan == winner.plan ? "" : why_not(c, winner);
    const bool is_scored = c.rejection == Rejection::kNone;
    json += format("%s{\"plan\": \"%s\", \"why_not\": \"%s\"", &c == &winner ? "" : ", ",
                   name(c.plan).c_str(), why.c_str());
    if (is_scored) {
      json += format(
          ", \"us\": %.6g, \"memory_us\": %.6g, \"sm_us\": %.6g, \"fixed_us\": %.6g, "
          "\"behind_quantizer_us\": %.6g",
          c.us(), c.estimate.memory, c.estimate.sm, c.estimate.fixed, c.behind_quantizer_us);
    }
    json += "}";
  }
  return json + "]}";
}

}  // namespace liquidgemm
