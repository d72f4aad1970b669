// NEON with dot products (Armv8.2 dotprod, and Armv8.6 i8mm): registers of 16 bytes. A chunk is
// four of them, and the four 32-bit lanes of each belong to rows g, g + 8, g, g + 8.
#pragma once

#include <arm_neon.h>

#include "liquidgemm/cpu/codes.hpp"

namespace liquidgemm::cpu {
namespace {

struct NeonDotprod {
  static constexpr int kTokens = 8;
  static constexpr int kRegisters = kChunk / 16;

  using Sums = int32x4_t;
  struct Codes {
    int8x16_t low[kRegisters], high[kRegisters];
  };
  using Steps = int32x4_t;

  static Sums zero() { return vdupq_n_s32(0); }

  static Codes codes(uint8_t const* chunk) {
    Codes result;
    for (int i = 0; i < kRegisters; ++i) {
      const uint8x16_t bytes = vld1q_u8(chunk + 16 * i);
      result.low[i] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
      result.high[i] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    }
    return result;
  }

  struct Codes6 : Codes {};
  static Codes6 codes6(uint8_t const* chunk, uint8_t const* second) {
    const uint8x8_t six = vdup_n_u8(0x3f);
    Codes6 result;
    for (int i = 0; i < kRegisters; ++i) {
      const uint8x16_t bytes = vld1q_u8(chunk + 16 * i);
      const uint8x8_t w0 = vget_low_u8(bytes), w1 = vget_high_u8(bytes);
      const uint8x8_t w2 = vld1_u8(second + 8 * i);
      const uint8x8_t fourth = vsri_n_u8(vsri_n_u8(w0, w1, 2), w2, 4);
      result.low[i] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(0x3f)));
      result.high[i] = vreinterpretq_s8_u8(vcombine_u8(vand_u8(w2, six), vshr_n_u8(fourth, 2)));
    }
    return result;
  }

  static Steps steps(uint8_t const* params) {
    const int32x2_t pair = vset_lane_s32(params[2], vdup_n_s32(params[0]), 1);
    return vcombine_s32(pair, pair);
  }

  static Sums dot(int8x16_t const (&codes)[kRegisters], int8_t const* x) {
    Sums sums = zero();
    for (int i = 0; i < kRegisters; ++i)
      sums = vdotq_s32(sums, codes[i], vld1q_s8(x + 16 * i));
    return sums;
  }

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    const Sums products = vaddq_s32(dot(codes.low, x), dot(codes.high, x + kChunk));
    return vmlaq_s32(sums, products, steps);
  }

  static Sums multiply_add(
      Sums sums, Codes const& codes, int8_t const* x, Steps steps, Steps high_steps) {
    const Sums of_low = vmlaq_s32(sums, dot(codes.low, x), steps);
    return vmlaq_s32(of_low, dot(codes.high, x + kChunk), high_steps);
  }

  struct Int8s {
    int8x16_t of[kRegisters];
  };
  static constexpr bool kInt8sAreBiased = false;
  static Int8s int8s(uint8_t const* chunk) {
    Int8s result;
    for (int i = 0; i < kRegisters; ++i)
      result.of[i] = vreinterpretq_s8_u8(vld1q_u8(chunk + 16 * i));
    return result;
  }
  static Sums multiply_add(Sums sums, Int8s const& weights, int8_t const* x) {
    for (int i = 0; i < kRegisters; ++i)
      sums = vdotq_s32(sums, weights.of[i], vld1q_s8(x + 16 * i));
    return sums;
  }

  static void add_offsets(uint8_t const* params, int32_t sum, int32_t* rows) {
    const uint8x8x4_t of_chunks = vld4_u8(params);  // s[g], a[g], s[g + 8], a[g + 8] of 8 chunks
    for (int half = 0; half < 2; ++half) {
      const int16x8_t a = vreinterpretq_s16_u16(vmovl_u8(of_chunks.val[2 * half + 1]));
      int32_t* const to = rows + 8 * half;
      vst1q_s32(to, vmlal_n_s16(vld1q_s32(to), vget_low_s16(a), int16_t(sum)));
      vst1q_s32(to + 4, vmlal_n_s16(vld1q_s32(to + 4), vget_high_s16(a), int16_t(sum)));
    }
  }

  static void fold(Sums const* sums, int stride, int32_t* rows) {
    for (int g = 0; g < kBandChunks; ++g) {
      const int32x4_t all = sums[g * stride];
      const int32x2_t both = vadd_s32(vget_low_s32(all), vget_high_s32(all));
      rows[g] = int32_t(uint32_t(rows[g]) + uint32_t(vget_lane_s32(both, 0)));
      rows[g + 8] = int32_t(uint32_t(rows[g + 8]) + uint32_t(vget_lane_s32(both, 1)));
    }
  }
};

}  // namespace
}  // namespace liquidgemm::cpu
