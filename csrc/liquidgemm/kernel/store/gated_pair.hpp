// Gated activations of 16-bit values, two to a word: the bits of `gated` of common/activation.hpp,
// in fewer instructions and without a branch per value, so that several overlap.
//
// There are 65536 gates of 16 bits. tests/gpu/test_gates.py compares all of them, for each
// activation and type: so what happens before the first rounding to 16 bits need not be exact.
//
//   bfloat16   sigmoid by the approximate exponential and reciprocal of the GPU
//   float16    has too many values for that: the exact sequence, with a division of its own
//
// Products of two 16-bit numbers are exact in fp32, and so are 1 + up's bits: multiplying and
// adding in 16 bits rounds as rounding fp32 results does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/container/array.hpp>

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/common/formula.hpp"

namespace liquidgemm {

template <class Pair>
CUTE_DEVICE Pair& as_pair(uint32_t& word) {
  return reinterpret_cast<Pair&>(word);
}
template <class Pair>
CUTE_DEVICE uint32_t as_word(Pair pair) {
  return reinterpret_cast<uint32_t const&>(pair);
}

CUTE_DEVICE float2 floats_of(uint32_t word, __nv_bfloat162) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
CUTE_DEVICE float2 floats_of(uint32_t word, __half2) {
  return __half22float2(as_pair<__half2>(word));
}

CUTE_DEVICE __nv_bfloat162 pair_of(float value, __nv_bfloat162) {
  return __float2bfloat162_rn(value);
}
CUTE_DEVICE __half2 pair_of(float value, __half2) {
  return __float2half2_rn(value);
}

// a / b for a of 16 bits and b from 1 to infinity, |a| from 1 to 1024 where b is finite and beyond
// 2^64. Without a branch: the compiler's own division has one, to where operands are extreme.
CUTE_DEVICE float divide_by_one_or_more(float a, float b) {
  const float scale = b > 0x1p64f ? 0x1p-64f : 1.f;  // a reciprocal is not to be denormal
  const float divisor = __fmul_rn(b, scale);
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(divisor));
  const float reciprocal = __fmaf_rn(__fmaf_rn(-divisor, estimate, 1.f), estimate, estimate);
  const float first = __fmul_rn(a, estimate);
  // Remainders are exact: the second correction rounds as a division does.
  const float second = __fmaf_rn(__fmaf_rn(-divisor, first, a), reciprocal, first);
  const float quotient = __fmaf_rn(__fmaf_rn(-divisor, second, a), reciprocal, second);
  // Infinities and NaNs have no remainder, but then the first product is right. Of -0 the remainder
  // is 0.
  return copysignf(__fmul_rn(quotient == quotient ? quotient : first, scale), a);
}

// gate * sigmoid of it, before rounding; clamped already where the activation clamps.
template <int kValues>
CUTE_DEVICE void activate(GatedActivation activation, float (&gates)[kValues], __nv_bfloat162) {
  // -log2(e), and what else is in front of the gate in the exponent. Of the constants that give
  // all gates their bits, those in the middle: some units in the last place from the nearest.
  constexpr float kSilu = -0x1.715472p0f, kSwiglu = -0x1.3a4cc8p1f;
  constexpr float kGelu = -0x1.26aec2p1f, kGeluCubic = kGelu * 0.044715f;
  float powers[kValues];
  if (activation == GatedActivation::kGeluTanhMul) {
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i)
      powers[i] = __fmul_rn(gates[i], __fmaf_rn(kGeluCubic, __fmul_rn(gates[i], gates[i]), kGelu));
  } else {
    const float factor = activation == GatedActivation::kSwigluClamped ? kSwiglu : kSilu;
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i)
      powers[i] = __fmul_rn(gates[i], factor);
  }
  CUTE_UNROLL
  for (int i = 0; i < kValues; ++i) {
    float power, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(powers[i]));
    // A quarter of 1 + power, whose reciprocal is never denormal unless it is to be 0.
    const float quarter = __fmaf_rn(power, 0.25f, 0.25f);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(quarter));
    gates[i] = __fmul_rn(__fmul_rn(gates[i], 0.25f), reciprocal);
  }
}

template <int kValues>
CUTE_DEVICE void activate(GatedActivation activation, float (&gates)[kValues], __half2) {
  float exponents[kValues];
  if (activation == GatedActivation::kGeluTanhMul) {
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i)
      exponents[i] = gelu_exponent(gates[i]);
  } else {
    const float factor = activation == GatedActivation::kSwigluClamped ? -kSwigluAlpha : -1.f;
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i)
      exponents[i] = rounded::multiply(factor, gates[i]);
  }
  CUTE_UNROLL
  for (int i = 0; i < kValues; ++i)
    gates[i] = divide_by_one_or_more(gates[i], one_plus_exp(exponents[i]));
}

// Turns words of gates into h; of two values each. NaNs remain NaNs.
template <class Pair, size_t kWords>
CUTE_DEVICE void gate_pairs(GatedActivation activation,
                            cute::array<uint32_t, kWords>& words,
                            cute::array<uint32_t, kWords>& ups) {
  if (activation == GatedActivation::kSwigluClamped) {
    const Pair limit = pair_of(kSwigluLimit, Pair{}), least = pair_of(-kSwigluLimit, Pair{});
    CUTE_UNROLL
    for (size_t i = 0; i < kWords; ++i) {
      words[i] = as_word(__hmin2_nan(as_pair<Pair>(words[i]), limit));
      ups[i] = as_word(__hadd2_rn(__hmax2_nan(__hmin2_nan(as_pair<Pair>(ups[i]), limit), least),
                                  pair_of(1.f, Pair{})));
    }
  }
  float gates[2 * kWords];
  CUTE_UNROLL
  for (size_t i = 0; i < kWords; ++i) {
    const float2 two = floats_of(words[i], Pair{});
    gates[2 * i] = two.x, gates[2 * i + 1] = two.y;
  }
  activate(activation, gates, Pair{});
  CUTE_UNROLL
  for (size_t i = 0; i < kWords; ++i) {
    words[i] = round_pair(gates[2 * i], gates[2 * i + 1], Pair{});
    words[i] = as_word(__hmul2_rn(as_pair<Pair>(words[i]), as_pair<Pair>(ups[i])));
  }
}

}  // namespace liquidgemm
