// Softmax over one tile of queries as a warp sees it, with weights that are integers.
#pragma once

#include "liquidgemm/attention/ptx.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shape.hpp"

namespace liquidgemm::attention {

inline constexpr float kTwo23 = 8388608.f;  // a float from here on has no fraction
inline constexpr float kMostSum = 65536.f;  // of probabilities relative to 2^most
inline constexpr float kLeast = -3.402823466e38f;

// A lane's part: one query, four tokens of every block.
//
// The weight of a token is w = 2^(score - most) * (scale of its value), and what meets the codes of
// values is n = rint(w * 2^exponent), 16 bits without sign in two digits. `most` and `exponent`
// are those of the largest score and weight so far, but they are raised only when a sum or a weight
// leaves its range, so that sums are in units of 2^unit = 2^(most - exponent) over many blocks.
// Both are whole numbers: raising the unit divides sums by a power of two.
struct Reference {
  float most = kLeast;
  float unit = -INFINITY;
  float total = 0;       // sum of 2^(score - most), of this lane
  float to_integer = 0;  // 2^exponent
  uint32_t zeros = 0;    // sum of n * (zero point of the value), of this lane
};

CUTE_DEVICE float group_max(float value) {  // of the 8 lanes with one query
  CUTE_UNROLL
  for (int stride = 4; stride < 32; stride *= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, stride));
  return value;
}

CUTE_DEVICE float max_of(float const (&x)[4]) {
  return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
}

// p = 2^(score - most), and 2^23 + n, whose last 16 bits are n.
CUTE_DEVICE void weigh(Reference const& reference,
                       float const (&score)[4],
                       float const (&value_scale)[4],
                       float (&p)[4],
                       float (&weight)[4]) {
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    p[i] = exp2_approximate(score[i] - reference.most);
    weight[i] = fmaf(p[i], value_scale[i] * reference.to_integer, kTwo23);
  }
}

CUTE_DEVICE bool leaves_range(float const (&p)[4], float const (&weight)[4]) {
  return p[0] + p[1] + (p[2] + p[3]) > kMostSum || max_of(weight) >= kTwo23 + 65536.f;
}

// High and low digit of a sum of products with n, 256 * high + low, times a power of two below 1.
CUTE_DEVICE void scale_sum(int& high, int& low, float factor) {
  const float sum = fmaf(static_cast<float>(high), 256.f, static_cast<float>(low)) * factor;
  high = __float2int_rn(sum * (1 / 256.f));
  low = __float2int_rn(fmaf(static_cast<float>(high), -256.f, sum));
}

// 2^x, of a whole number in -126 ... 126.
CUTE_DEVICE float power_of_two(float x) {
  return __int_as_float((static_cast<int>(x) + 127) << 23);
}

// Raises the references of the queries of which any lane asks for it. All lanes call it.
template <int kSums>
CUTE_DEVICE void raise(Reference& reference,
                       bool asks,
                       float const (&score)[4],
                       float const (&value_scale)[4],
                       int (&sums)[kSums][4]) {
  const uint32_t lanes_of_query = 0x11111111u << threadIdx.x % 4;
  const bool raised = __ballot_sync(kAllLanes, asks) & lanes_of_query;
  const float largest = group_max(max_of(score));
  const float most = largest > reference.most ? ceilf(largest) : reference.most;
  float w[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i)
    w[i] = exp2_approximate(score[i] - most) * value_scale[i];
  const float heaviest = group_max(max_of(w));
  if (!raised)
    return;
  float unit = fmaxf(reference.unit, most - 126.f);
  if (heaviest > 0) {  // n of 15 bits, so that there is one left
    const int exponent = (__float_as_int(heaviest) >> 23) - 127;
    unit = fmaxf(unit, most + static_cast<float>(exponent - 14));
  }
  const float shift = unit - reference.unit;
  if (shift > 0 && reference.unit > kLeast) {
    const float factor = power_of_two(fmaxf(-shift, -126.f));
    CUTE_UNROLL
    for (int i = 0; i < kSums; ++i) {
      scale_sum(sums[i][0], sums[i][1], factor);
      scale_sum(sums[i][2], sums[i][3], factor);
    }
    reference.zeros = __float2uint_rn(static_cast<float>(reference.zeros) * factor);
  }
  reference.total *= exp2_approximate(reference.most - most);
  reference.most = most;
  reference.unit = unit;
  reference.to_integer = power_of_two(fmaxf(most - unit, -126.f));
}

}  // namespace liquidgemm::attention
