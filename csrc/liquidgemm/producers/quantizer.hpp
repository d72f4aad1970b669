// Quantization of activations, for the kernel that does only that and for GEMMs of few tokens that
// do it themselves:
//
//   scale[m] = max_k |x[m, k]| / 127,  out[m, k] = clamp(rint(x[m, k] / scale[m]), -127, 127)
//
// in fp32, rounded as IEEE division and rint are, ties to even. A row with a NaN or an infinity
// gets scale NaN and zeros, so that its outputs, and no others, are NaN; a row of zeros gets scale
// 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/common/int8.hpp"
#include "liquidgemm/producers/quantizer_threads.hpp"

namespace liquidgemm {

CUTE_DEVICE float to_float(float v) {
  return v;
}
CUTE_DEVICE float to_float(__half v) {
  return __half2float(v);
}
CUTE_DEVICE float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

// What a thread loads, converts and stores at once.
template <class T>
struct alignas(16) Vector {
  T values[kVector];

  // Elements past `count` are zeros: they change neither the maximum nor anything that is stored.
  // Rows that are read once only should not push others out of the L2 cache: `streamed`.
  CUTE_DEVICE void load(T const* source, int64_t count, bool aligned, bool streamed = false) {
    if (aligned && count >= kVector) {
      constexpr int kLoads = sizeof(values) / sizeof(uint4);
      CUTE_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        uint4 const* const from = reinterpret_cast<uint4 const*>(source) + i;
        reinterpret_cast<uint4*>(values)[i] = streamed ? __ldcs(from) : *from;
      }
    } else {
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i)
        values[i] = i < count ? source[i] : T(0.f);
    }
  }
};

// The largest magnitude of some x, as an integer: |x| orders like its bits do, with infinity and
// then NaN above every number.
template <class T>
class Largest {
 public:
  CUTE_DEVICE void add(Vector<T> const& vector) {
    uint32_t const* const words = reinterpret_cast<uint32_t const*>(vector.values);
    CUTE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint32_t)); ++i) {
      if constexpr (sizeof(T) == 2) {  // two at a time
        bits_ = __vmaxu2(bits_, words[i] & 0x7fff7fffu);
      } else {
        bits_ = max(bits_, words[i] & 0x7fffffffu);
      }
    }
  }

  // As bits of a float.
  CUTE_DEVICE uint32_t float_bits() const {
    if constexpr (sizeof(T) == 2) {
      const uint16_t largest = max(bits_ & 0xffffu, bits_ >> 16);
      return __float_as_uint(to_float(reinterpret_cast<T const&>(largest)));
    } else {
      return bits_;
    }
  }

 private:
  uint32_t bits_ = 0;
};

// Of a row whose largest magnitude has these bits.
CUTE_DEVICE float activation_scale(uint32_t largest_bits) {
  constexpr uint32_t kInfinityBits = 0x7f800000u, kNanBits = 0x7fc00000u;
  return largest_bits < kInfinityBits
             ? __fdiv_rn(__uint_as_float(largest_bits), float(kMaxActivation))
             : __uint_as_float(kNanBits);
}

// x / scale, rounded to an integer, for one scale and many x.
class Quantizer {
 public:
  // Scales of a common size need neither of the two precautions of the general way.
  CUTE_DEVICE static bool is_common(float scale) { return scale >= kSmallestCommon; }

  CUTE_DEVICE explicit Quantizer(float scale) {
    const bool valid = scale > 0.f;  // else everything becomes 0
    // A power of two leaves the quotient as it is and keeps the reciprocal and remainders normal.
    unit_ = scale < kSmallestCommon ? 1.f / kSmallestCommon : 1.f;
    scale_ = valid ? scale * unit_ : 0.f;
    reciprocal_ = valid ? __frcp_rn(scale_) : 0.f;
  }

  // Eight bytes.
  template <bool kCommon, class T>
  CUTE_DEVICE uint2 quantize(Vector<T> const& vector) const {
    uint32_t bytes[kVector];
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i)
      bytes[i] = quantize<kCommon>(to_float(vector.values[i]));
    return make_uint2(low_bytes(bytes[0], bytes[1], bytes[2], bytes[3]),
                      low_bytes(bytes[4], bytes[5], bytes[6], bytes[7]));
  }

 private:
  static constexpr float kSmallestCommon = 0x1p-64f;

  // The low byte is the result.
  template <bool kCommon>
  CUTE_DEVICE uint32_t quantize(float x) const {
    if constexpr (kCommon) {
      constexpr float kRound = 0x1.8p23f;  // leaves no bits for a fraction
      return __float_as_uint(__fadd_rn(divide(x), kRound));
    } else {
      // A scale with few bits left, as of a row of denormals, can leave quotients beyond the range.
      const int rounded = __float2int_rn(divide(x * unit_));
      return max(-kMaxActivation, min(kMaxActivation, rounded));
    }
  }

  // As IEEE division (Markstein, "Computation of elementary functions on the IBM RISC System/6000
  // processor", 1990): with a correctly rounded reciprocal, one correction by the exact remainder
  // rounds the quotient correctly.
  CUTE_DEVICE float divide(float x) const {
    const float approximate = __fmul_rn(x, reciprocal_);
    const float remainder = __fmaf_rn(-approximate, scale_, x);
    return __fmaf_rn(remainder, reciprocal_, approximate);
  }

  CUTE_DEVICE static uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
  }

  float unit_, scale_, reciprocal_;
};

}  // namespace liquidgemm
