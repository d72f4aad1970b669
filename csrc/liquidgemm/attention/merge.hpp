// Adds the partial results of a sequence's chunks, in their order: a warp per query row.
#pragma once

#include <cuda_bf16.h>

#include "liquidgemm/attention/ptx.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shape.hpp"

namespace liquidgemm::attention {

static_assert(kKvMaxChunks == 64, "two for each lane");

CUTE_DEVICE void store_element(void* out, int64_t at, Element type, float value) {
  if (type == Element::kBFloat16)
    static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
  else if (type == Element::kFloat16)
    static_cast<__half*>(out)[at] = __float2half_rn(value);
  else
    static_cast<float*>(out)[at] = value;
}

// The output of one query row of sequence b and key head h. `partial_of(chunk)` is the row's
// partial result, `stats_of(chunk)` its largest score and sum of probabilities.
template <class Shape, class PartialOf, class StatsOf>
CUTE_DEVICE void merge_row(KvAttentionArguments const& a,
                           int b,
                           int h,
                           int row,
                           Chunks const& chunks,
                           PartialOf const& partial_of,
                           StatsOf const& stats_of) {
  constexpr int kHeld = Shape::kHeadDim / 32;
  const int lane = threadIdx.x % 32;
  // The first chunks are asked for before their weights are known.
  constexpr int kAhead = 4;
  const auto load = [&](float (&held)[kHeld], int chunk) {
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      held[i] = chunk < chunks.end ? partial_of(chunk)[lane + 32 * i] : 0.f;
  };
  float ahead[kAhead][kHeld];
  CUTE_UNROLL
  for (int i = 0; i < kAhead; ++i)
    load(ahead[i], chunks.begin + i);

  // Chunk c is lane c % 32's.
  float most[2], total = 0, weight[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int chunk = lane + 32 * i;
    const bool used = chunk >= chunks.begin && chunk < chunks.end;
    const float2 stats = used ? *stats_of(chunk) : make_float2(-INFINITY, 0);
    most[i] = stats.x;
    weight[i] = stats.y;
  }
  const float largest = warp_max(fmaxf(most[0], most[1]));
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float factor = most[i] > -INFINITY ? exp2_approximate(most[i] - largest) : 0.f;
    total += weight[i] * factor;
    weight[i] = factor;
  }
  CUTE_UNROLL
  for (int stride = 16; stride > 0; stride /= 2)
    total += __shfl_xor_sync(kAllLanes, total, stride);

  float sum[kHeld] = {};
  const auto add = [&](float const(&held)[kHeld], int chunk) {
    const float factor = __shfl_sync(kAllLanes, chunk < 32 ? weight[0] : weight[1], chunk % 32);
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      sum[i] = fmaf(held[i], factor, sum[i]);
  };
  CUTE_UNROLL
  for (int i = 0; i < kAhead; ++i)
    add(ahead[i], chunks.begin + i);  // past the end: nothing
#pragma unroll 4
  for (int chunk = chunks.begin + kAhead; chunk < chunks.end; ++chunk) {
    float held[kHeld];
    load(held, chunk);
    add(held, chunk);
  }
  if constexpr (Shape::kInt4) {  // values are rotated
    rotate(sum);
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      sum[i] *= 1.f / Shape::kHeadDim;
  }
  const int64_t token = static_cast<int64_t>(b) * a.queries + row / a.group;
  const int64_t at = ((token * a.cache.heads + h) * a.group + row % a.group) * Shape::kHeadDim;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    // Zeros where a query sees no token.
    const float value = total == 0 ? 0.f : sum[i] / total;
    store_element(a.out, at + lane + 32 * i, a.type, value);
  }
}

}  // namespace liquidgemm::attention
