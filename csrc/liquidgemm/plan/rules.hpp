// What the cost model does not predict, as measured: each rule is one predicate or one table. The
// figures behind a rule are in docs/experiments, in the file and under the heading that it names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "liquidgemm/plan/divide.hpp"
#include "liquidgemm/plan/tiles.hpp"
#include "liquidgemm/producers/quantizer_threads.hpp"

namespace liquidgemm {

// --------------------------------------------------------------------------------------------------
// Which plans are considered. bench/plan/ measures and fits the same ones.

// A tile far too large or too small for m tokens is neither measured nor considered, unless there
// is no smaller one.
// Experiment: decode.md, "Tiles".
inline bool is_plausible(TileShape const& tile,
                         int64_t m,
                         FormatId format = FormatId::kLiquidQuant) {
  const bool too_large = tile.tokens > fewest_tokens(format) &&
                         tile.tokens >= (m <= 16 ? 2 : 4) * std::max<int64_t>(m, 8);
  const bool too_small = m > 4 * tile.tokens && tile.tokens < 128;
  return !too_large && !too_small;
}

// Clusters of four that take several rounds are always slower than the model says.
// Experiment: plan.md, "Clusters of four".
inline bool is_quad_in_several_rounds(Plan const& plan, Division const& d) {
  return plan.split_k == 4 && d.whole_rounds > 1;
}

inline constexpr double kHalfSmBytes = 160e3;
inline constexpr double kHalfSmBytesBehindQuantizer = 140e3;

// CTAs of half an SM pay if the ring holds most of what each reads, so that it is fetched while the
// launch before still computes, and if there is one round of them; behind a quantizer also only if
// no weights are shared.
// Experiments: decode.md, "CTAs of half an SM"; linear.md, "Plan behind a quantizer".
inline bool half_sm_pays(Problem const& p,
                         Plan const& plan,
                         Division const& d,
                         Activations activations) {
  const bool behind_quantizer = activations == Activations::kJustQuantized;
  const int64_t bytes =
      blocks_per_cta(plan, d.stages) * (block_bytes(p.format) + kBlockK * plan.tile.tokens);
  const double limit = behind_quantizer ? kHalfSmBytesBehindQuantizer : kHalfSmBytes;
  return bytes <= limit && d.whole_rounds == 1 && !(behind_quantizer && d.m_tiles > 1);
}

inline constexpr double kMostBytesBesideIdleSms = 220e3;

// While half of the SMs are idle, a CTA does not read more weights of 6 or 8 bits than its ring
// holds: it is slower than the model says, which for 4-bit weights selects no such plan anyway.
// Experiments: formats.md, "Plans of INT8 weights", "Plans of 6-bit codes".
inline bool should_share_k(Problem const& p, Plan const& plan, Division const& d) {
  const int64_t ctas = int64_t(d.m_tiles) * d.n_tiles * plan.cluster();
  const int64_t bytes = blocks_per_cta(plan, d.stages) * block_bytes(p.format);
  return p.format != FormatId::kLiquidQuant && !plan.tile.can_pair() && plan.split_k < 4 &&
         2 * ctas <= p.num_sms && bytes > kMostBytesBesideIdleSms;
}

// --------------------------------------------------------------------------------------------------
// Behind a quantizer: what a plan costs more than in a chain of GEMMs. The quantizer has one CTA
// per token.

inline constexpr double kHalfSmBehindQuantizerUs[2] = {0.15, 0.6};  // without and with split-K
inline constexpr double kNoRoomUs = 0.8;

// The quantizer starts late if its CTAs do not fit the SMs that the GEMM before leaves idle.
// Experiment: linear.md, "Plan behind a quantizer".
inline bool leaves_no_room_for_quantizer(Problem const& p, Plan const& plan, Division const& d) {
  constexpr int kThreadsPerSm = 2048;  // sm_90
  const int64_t threads = std::min<int64_t>(kMaxQuantizerThreads, ceil_div(p.k, kVector));
  const int64_t idle_sms = p.num_sms - std::lround(p.num_sms * busy_at_the_end(plan, d, p.num_sms));
  return p.m * threads > idle_sms * kThreadsPerSm;
}

// Beside CTAs of half an SM the quantizer has room, but then the next GEMM has none, least of all
// for a cluster.
// Experiment: as above.
inline double us_behind_quantizer(Problem const& p, Plan const& plan, Division const& d) {
  if (plan.tile.ctas_per_sm > 1)
    return kHalfSmBehindQuantizerUs[plan.split_k > 1];
  return leaves_no_room_for_quantizer(p, plan, d) ? kNoRoomUs : 0;
}

// --------------------------------------------------------------------------------------------------
// Whether a linear layer is one launch, whose kernel quantizes the activations, or two.

// No rule but a limit: registers and shared memory hold the activations.
inline bool can_quantize_in_kernel(int64_t m, int64_t k, Plan const& plan) {
  TileShape const& tile = plan.tile;
  if (!tile.can_quantize() || m > tile.tokens || k % 8 != 0)
    return false;
  int64_t rows = 1;  // a power of two of them, to which the warps are dealt out
  while (rows < m)
    rows *= 2;
  const int64_t stage_k = tile.stage_blocks * kBlockK;
  const int64_t stages = ceil_div(k, stage_k);
  const int64_t share = blocks_per_cta(plan, stages) * kBlockK;
  return rows * stages * stage_k <= kMostQuantizedElements &&
         share / 16 * quantized_chunk_stride(m) <= most_quantized_bytes(tile.ctas_per_sm);
}

inline constexpr int64_t kLittleToQuantize = 16 << 10;  // elements of x

// Reading x is hidden if CTAs are resident early (half an SM) and x is small, or if each CTA has
// three tiles or more, so that its ring is full before x arrives.
// Experiment: linear.md, "One launch or two".
inline bool pays_to_quantize_in_kernel(Problem const& p, Plan const& plan, Division const& d) {
  return plan.tile.ctas_per_sm > 1 ? p.m * p.k <= kLittleToQuantize : d.whole_rounds > 2;
}

// --------------------------------------------------------------------------------------------------
// Weights before activations. With programmatic dependent launch, CTAs fetch weights while the
// kernel before still runs, and may dequantize them.

// The next launch, taken to be of the same shape, begins on SMs that this one leaves idle, and its
// first weights are there long before its activations.
// Experiment: decode.md, "Prefetch of weights".
inline bool leaves_sms_idle(Plan const& plan, Division const& d, int num_sms) {
  return d.whole_rounds == 1 && busy_at_the_end(plan, d, num_sms) <= 0.75;
}

// Of several rounds the last one keeps half of the SMs busy, and K is not split.
// Experiment: as above.
inline bool leaves_half_idle_at_the_end(Plan const& plan, Division const& d, int num_sms) {
  return d.whole_rounds > 1 && plan.split_k == 1 && busy_at_the_end(plan, d, num_sms) <= 0.5;
}

// A row of a prefetch table holds for tiles of at most so many tokens, launches of so many rounds,
// CTAs with such a share of K, and a last round that leaves so many SMs idle.
enum class Rounds { kAny, kOne, kTwo, kOneOrTwo };
enum class Share { kAny, kShort, kLong };  // of K: the ring holds it, or a part
enum class Idle { kAny, kSome, kHalf };    // leaves_sms_idle, leaves_half_idle_at_the_end
struct Prefetch {
  int tokens;
  Rounds rounds;
  Share share;
  Idle idle;
  int eighths;
};
inline constexpr int kAnyTokens = 1 << 30;

// The first row that holds says how much of the ring, in eighths, is filled with weights before the
// first activations arrive. More would delay the activations, or what they are made of, or the last
// CTAs of a launch before; but if that launch keeps all SMs busy to its end, the whole ring is best
// requested at once.
// Experiments: decode.md, "Prefetch of weights"; linear.md, "Prefetch behind a quantizer".
inline constexpr Prefetch kPrefetchOfHalfSm[] = {
    {8, Rounds::kAny, Share::kAny, Idle::kAny, 5},
    {16, Rounds::kAny, Share::kAny, Idle::kAny, 6},
    {kAnyTokens, Rounds::kAny, Share::kAny, Idle::kAny, 8},
};
inline constexpr Prefetch kPrefetchBehindQuantizer[] = {
    {8, Rounds::kOneOrTwo, Share::kLong, Idle::kAny, 8},
    {8, Rounds::kTwo, Share::kAny, Idle::kAny, 6},
    {8, Rounds::kOne, Share::kShort, Idle::kAny, 4},
    {32, Rounds::kOne, Share::kShort, Idle::kAny, 5},
    {32, Rounds::kOne, Share::kLong, Idle::kAny, 7},
    {16, Rounds::kOne, Share::kAny, Idle::kAny, 6},
    {32, Rounds::kAny, Share::kAny, Idle::kAny, 7},
    {128, Rounds::kAny, Share::kAny, Idle::kAny, 6},
    {kAnyTokens, Rounds::kAny, Share::kAny, Idle::kAny, 8},
};
inline constexpr Prefetch kPrefetchWhenReady[] = {
    {8, Rounds::kAny, Share::kLong, Idle::kSome, 8},
    {8, Rounds::kAny, Share::kAny, Idle::kSome, 6},
    {16, Rounds::kAny, Share::kAny, Idle::kSome, 7},
    {64, Rounds::kAny, Share::kAny, Idle::kSome, 6},
    {8, Rounds::kAny, Share::kShort, Idle::kHalf, 6},
    {16, Rounds::kAny, Share::kShort, Idle::kHalf, 7},
    {32, Rounds::kAny, Share::kAny, Idle::kAny, 8},
    {64, Rounds::kAny, Share::kAny, Idle::kAny, 7},
    {kAnyTokens, Rounds::kAny, Share::kAny, Idle::kAny, 8},
};
inline constexpr int kPrefetchWhenQuantizing = 6;

inline int eighths_ahead(Plan const& plan,
                         Division const& d,
                         int num_sms,
                         Activations activations) {
  if (activations == Activations::kQuantizeInKernel)
    return kPrefetchWhenQuantizing;
  const bool idle = leaves_sms_idle(plan, d, num_sms);
  const int64_t blocks = blocks_per_cta(plan, d.stages);
  const Share share = blocks <= 64                 ? Share::kShort
                      : blocks > (idle ? 96 : 112) ? Share::kLong
                                                   : Share::kAny;
  const auto holds = [&](Prefetch const& row) {
    const bool rounds = row.rounds == Rounds::kAny ||
                        (row.rounds == Rounds::kOneOrTwo && d.whole_rounds <= 2) ||
                        (row.rounds == Rounds::kOne && d.whole_rounds <= 1) ||
                        (row.rounds == Rounds::kTwo && d.whole_rounds == 2);
    return plan.tile.tokens <= row.tokens && rounds &&
           (row.share == Share::kAny || row.share == share) &&
           (row.idle == Idle::kAny || (row.idle == Idle::kSome && idle) ||
            (row.idle == Idle::kHalf && leaves_half_idle_at_the_end(plan, d, num_sms)));
  };
  const auto eighths = [&](auto const& table) {
    return std::find_if(std::begin(table), std::end(table), holds)->eighths;
  };
  return plan.tile.ctas_per_sm > 1                    ? eighths(kPrefetchOfHalfSm)
         : activations == Activations::kJustQuantized ? eighths(kPrefetchBehindQuantizer)
                                                      : eighths(kPrefetchWhenReady);
}

// Weights are dequantized before the activations arrive where they arrive first; elsewhere that
// delays the first multiplications.
// Experiment: decode.md, "Weights dequantized before the activations arrive".
inline bool weights_arrive_first(Plan const& plan,
                                 Division const& d,
                                 int num_sms,
                                 Activations activations) {
  return activations == Activations::kJustQuantized || plan.tile.ctas_per_sm > 1 ||
         leaves_sms_idle(plan, d, num_sms);
}

// How many stages of each k group: as many as registers hold, and as every group of every CTA has.
inline int stages_ahead(Plan const& plan, Division const& d, int num_sms, Activations activations) {
  if (activations == Activations::kQuantizeInKernel ||
      !weights_arrive_first(plan, d, num_sms, activations))
    return 0;
  return std::min(plan.tile.stages_ahead, d.stages / plan.split_k / plan.tile.k_groups);
}

}  // namespace liquidgemm
