// AVX512-VNNI: four products of bytes per 32-bit lane (vpdpbusd), in registers of 64 bytes, each a
// chunk.
#pragma once

#include "liquidgemm/cpu/x86.hpp"

namespace liquidgemm::cpu {
namespace {

struct Avx512Vnni {
  static constexpr int kTokens = 8;
  // A lane has four products of the chunk's low nibbles and four of its high ones. Its upper 16
  // bits, which are its sign, are multiplied by 0.
  static_assert(8 * kLargestCode * kLargestX <= kInt16Max);

  using Sums = __m512i;
  struct Codes {
    __m512i low, high;
  };
  using Steps = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }

  static Codes codes(uint8_t const* chunk) {
    const __m512i nibble = _mm512_set1_epi8(15), bytes = _mm512_loadu_si512(chunk);
    return {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
  }

  static Steps steps(uint8_t const* params) {
    const __m128i order = _mm_setr_epi8(0, -1, -1, -1, 2, -1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(load_word(params)), _mm512_broadcast_i32x4(order));
  }

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    __m512i products = _mm512_dpbusd_epi32(zero(), codes.low, _mm512_loadu_si512(x));
    products = _mm512_dpbusd_epi32(products, codes.high, _mm512_loadu_si512(x + kChunk));
    return _mm512_dpwssd_epi32(sums, products, steps);
  }

  static constexpr int kFewestTokens = 24;
  static constexpr int kChunksAtOnce = 2;

  // A code times s fits a byte, so that a 16-bit product of two codes does not carry.
  static void decode(uint8_t const* chunk, uint8_t const* params, uint8_t* bytes) {
    const __m512i words = _mm512_set1_epi32(load_word(params));
    const __m128i step_order =
        _mm_setr_epi8(0, -1, 0, -1, 2, -1, 2, -1, 0, -1, 0, -1, 2, -1, 2, -1);
    const __m128i offset_order = _mm_setr_epi8(1, 1, 1, 1, 3, 3, 3, 3, 1, 1, 1, 1, 3, 3, 3, 3);
    const __m512i s = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(step_order));
    const __m512i a = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(offset_order));
    const Codes from = codes(chunk);
    _mm512_storeu_si512(bytes, _mm512_add_epi8(_mm512_mullo_epi16(from.low, s), a));
    _mm512_storeu_si512(bytes + kChunk, _mm512_add_epi8(_mm512_mullo_epi16(from.high, s), a));
  }

  static Sums load(void const* bytes) { return _mm512_loadu_si512(bytes); }

  static Sums dot(Sums sums, Sums weights, Sums x) { return _mm512_dpbusd_epi32(sums, weights, x); }

  static void add_offsets(uint8_t const* params, int32_t sum, int32_t* rows) {
    add_offsets256(params, sum, rows);
  }

  static void fold(Sums const* sums, int stride, int32_t* rows) {
    fold_quads(
        [&](int g) {
          const __m512i all = sums[g * stride];
          return quad_of(
              _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)));
        },
        rows);
  }
};

}  // namespace
}  // namespace liquidgemm::cpu
