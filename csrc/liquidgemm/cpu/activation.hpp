// Quantization of one row of activations, and conversions between float types, in plain C++ that
// the compiler vectorizes for each instruction set:
//
//   scale = max|x| / 127,  out = clamp(rint(x / scale), -127, 127)
//
// with IEEE division and ties to even. A row with a NaN or an infinity gets scale NaN and zeros, a
// row whose scale is zero gets zeros.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>

#include "liquidgemm/cpu/simd.hpp"

namespace liquidgemm::cpu {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// bfloat16 and float16 as types of their own: both are 16 bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return float_of(uint32_t{value.bits} << 16);
}
inline float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &value.bits, sizeof half);
  return half;
#else
  // The exponent and mantissa of a normal number shifted into place, then scaled by the difference
  // of the biases, 2^112, which also makes denormals right: the product is exact.
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  return float_of(sign | (magnitude < 0x7c00u ? finite : 0x7f800000u | magnitude << 13));
#endif
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
inline Float16 to_float16(float value) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
  const __fp16 half = __fp16(value);
  Float16 result;
  memcpy(&result, &half, sizeof half);
  return result;
#else
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  // Below the smallest normal number the sum with 0.5 has the result's unit in its last place.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u - 0x1000u ? 0x7c00u : half;  // 65520 and more
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(sign | half)};
#endif
}

// Many at once: conversions of float16 are instructions that the compiler does not make vectors of.
template <class T>
void to_floats(T const* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = to_float(from[i]);
}
#if defined(__F16C__)
inline void to_floats(Float16 const* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)  // two halves could not be loaded as one right after they are stored
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(halves));
  }
#endif
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < count; ++i)
    to[i] = to_float(from[i]);
}
#endif
inline void to_float16s(float const* from, int64_t count, Float16* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
#endif
  for (; i < count; ++i)
    to[i] = to_float16(from[i]);
}

// The largest magnitude in a row, as bits of its own type: |x| orders like its bits, infinity and
// then NaN above every number.
inline float largest(float const* x, int64_t k) {
  uint32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return float_of(most);
}
template <class T>
float largest(T const* x, int64_t k) {
  uint16_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint16_t bits = x[i].bits & 0x7fffu;
    most = bits > most ? bits : most;
  }
  return to_float(T{most});
}

template <class T>
float quantize_row(T const* x, int64_t k, int8_t* out) {
  const float most = largest(x, k);
  const bool finite = bits_of(most) < 0x7f800000u;
  const float scale = finite ? most / 127.f : float_of(0x7fc00000u);
  if (!(scale > 0.f)) {
    memset(out, 0, size_t(k));
    return scale;
  }
  // Adding this leaves no bits for a fraction. A quotient is at most 190.5, by a scale that has no
  // bits left and was rounded down.
  constexpr float kRound = 0x1.8p23f;
  constexpr int32_t kRoundBits = 0x4b400000;
  constexpr int64_t kPart = 64;
  const auto part = [&](int64_t begin, int64_t count) {
    float buffer[kPart];
    float const* values = buffer;
    if constexpr (std::is_same_v<T, float>)
      values = x + begin;
    else
      to_floats(x + begin, count, buffer);
    for (int64_t i = 0; i < count; ++i) {
      const float shifted = values[i] / scale + kRound;
      int32_t q;
      memcpy(&q, &shifted, sizeof q);
      q -= kRoundBits;
      q = q > 127 ? 127 : q;
      q = q < -127 ? -127 : q;
      out[begin + i] = int8_t(q);
    }
  };
  int64_t begin = 0;
  for (; begin + kPart <= k; begin += kPart)
    part(begin, kPart);
  if (begin < k)
    part(begin, k - begin);
  return scale;
}

inline float quantize(void const* x, Element type, int64_t k, int8_t* out) {
  switch (type) {
    case Element::kBFloat16:
      return quantize_row(static_cast<BFloat16 const*>(x), k, out);
    case Element::kFloat16:
      return quantize_row(static_cast<Float16 const*>(x), k, out);
    default:
      return quantize_row(static_cast<float const*>(x), k, out);
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
