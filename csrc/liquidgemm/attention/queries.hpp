// Queries as two signed digits of base 256, which meet the codes of keys in exact products.
#pragma once

#include "liquidgemm/attention/ptx.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shared.hpp"

namespace liquidgemm::attention {

inline constexpr int kMostQuery = 127 * 256 + 127;

// Row r of those that share a key head is query token r / group and head r % group.
template <class Shape>
CUTE_DEVICE void prepare_queries(
    KvAttentionArguments const& a, int b, int h, int first_row, Shared<Shape>& shared) {
  constexpr int kHeld = Shape::kHeadDim / 32;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < Shape::kRows; row += Shape::kWarps) {
    const int r = first_row + row;
    float held[kHeld] = {};
    if (r < a.queries * a.group) {
      const int64_t at = b * a.q_stride[0] + r / a.group * a.q_stride[1] +
                         (static_cast<int64_t>(h) * a.group + r % a.group) * a.q_stride[2];
      load_row(held, element_at(a.q, at, a.type), a.type);
    }
    const bool finite = all_finite(held);
    rotate(held);
    float most = 0;
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      most = fmaxf(most, fabsf(held[i]));
    const float step = warp_max(most) / kMostQuery, inverse = 1.f / step;
    const bool usable = finite && inverse < __int_as_float(0x7f800000);
    int sum = 0;
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const float code = usable ? rintf(held[i] * inverse) : 0.f;
      const int q = min(max(static_cast<int>(code), -kMostQuery), kMostQuery);
      sum += q;
      const int high = (q + 128) >> 8;
      shared.digits[row][0][lane + 32 * i] = static_cast<uint8_t>(high);
      shared.digits[row][1][lane + 32 * i] = static_cast<uint8_t>(q);
    }
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane == 0) {
      // Queries and keys are both rotated, without the factor 1 / sqrt(head_dim).
      const float scale = step * (a.scale * kLog2E / Shape::kHeadDim);
      shared.query_scale[row] = finite ? scale : __int_as_float(0x7fffffff);
      shared.query_sum[row] = sum;
    }
  }
}

// The second factor of the products: of step `step` and tile `tile`.
template <class Shape>
CUTE_DEVICE uint2 query_fragment(Shared<Shape> const& shared, int step, int tile) {
  const int lane = threadIdx.x % 32, column = lane / 4, t = lane % 4;
  constexpr int kStepsOfWidth = Shape::kWidth / 32;
  const int pair = step % kStepsOfWidth;  // 8 bytes of a lane's pieces
  int d = Shape::kKeyPiece == 8 ? 8 * t : pair / 2 * 64 + 16 * t + pair % 2 * 8;
  d += step / kStepsOfWidth * Shape::kWidth;  // high nibbles
  return *reinterpret_cast<uint2 const*>(&shared.digits[4 * tile + column / 2][column % 2][d]);
}

}  // namespace liquidgemm::attention
