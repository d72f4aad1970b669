// How early a launch deals with its weights: what it requests, and what it dequantizes, before
// there are tokens. With programmatic dependent launch that is while the kernel before still runs.
// No model, but rules as measured (bench/NOTES.md), pure functions like the plan's choice.
//
//   x_is_new   the kernel before quantizes the activations, and this one waits for it
//   quantizes  this one does so itself
#pragma once

#include "liquidgemm/plan/plan.hpp"

namespace liquidgemm {

// Whether the next launch, taken to be of the same shape, can begin on SMs that this one leaves
// idle. Its first weights are then there long before its tokens.
inline bool leaves_sms_idle(Plan const& plan, Division const& d, int num_sms) {
  return d.whole_rounds == 1 && busy_at_the_end(plan, d, num_sms) <= 0.75;
}

// How much of the ring, in eighths, is filled with weights before the first tokens are here. The
// rest would delay the tokens, or what they are made of, and a launch before this one whose last
// CTAs still stream their weights. But where that one keeps all SMs busy to its end, this one's
// first lap is best requested at once.
inline int eighths_ahead(
    Plan const& plan, Division const& d, int num_sms, bool quantizes, bool x_is_new) {
  TileShape const& shape = plan.tile;
  if (quantizes)
    return 6;
  if (shape.ctas_per_sm > 1)
    return shape.tokens == 8 ? 5 : shape.tokens == 16 ? 6 : 8;
  if (shape.tokens > 128)
    return 8;
  // The ring could hold all of a short share of K. Of a long one most is streamed after the tokens
  // have come, which it delays little.
  const int64_t blocks = blocks_per_cta(plan, d.stages);
  const bool is_idle = leaves_sms_idle(plan, d, num_sms);
  const bool is_short = blocks <= 64;
  const bool is_long = blocks > (is_idle ? 96 : 112);
  if (x_is_new) {  // the quantizer still reads it
    if (shape.tokens > 32)
      return 6;
    if (is_long && d.whole_rounds <= 2)
      return shape.tokens == 8 ? 8 : 7;
    if (d.whole_rounds > 1)
      return d.whole_rounds == 2 && shape.tokens == 8 ? 6 : 7;
    return is_short ? (shape.tokens == 8 ? 4 : 5) : shape.tokens <= 16 ? 6 : 7;
  }
  if (shape.tokens > 64)
    return 8;
  if (is_idle)
    return shape.tokens == 8 && is_long ? 8 : shape.tokens == 16 ? 7 : 6;
  const bool idle_at_last = busy_at_the_end(plan, d, num_sms) <= 0.5;
  if (d.whole_rounds > 1 && idle_at_last && is_short && plan.split_k == 1 && shape.tokens <= 16)
    return shape.tokens == 8 ? 6 : 7;
  return shape.tokens == 64 ? 7 : 8;
}

// How many stages of each k group are dequantized before there are tokens: where their weights are
// there first. Elsewhere that delays the first multiplications.
inline int stages_ahead(
    Plan const& plan, Division const& d, int num_sms, bool quantizes, bool x_is_new) {
  TileShape const& shape = plan.tile;
  if (quantizes || !(x_is_new || shape.ctas_per_sm > 1 || leaves_sms_idle(plan, d, num_sms)))
    return 0;
  // Every group of every CTA must have them.
  return std::min(shape.stages_ahead, d.stages / plan.split_k / shape.k_groups);
}

}  // namespace liquidgemm
