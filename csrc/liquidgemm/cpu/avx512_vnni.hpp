// AVX512-VNNI: four products of bytes per 32-bit lane (vpdpbusd), in registers of 64 bytes, each a
// chunk.
#pragma once

#include "liquidgemm/cpu/decode512.hpp"
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

  using Codes6 = Codes6Of64Bytes;
  static Codes6 codes6(uint8_t const* chunk, uint8_t const* second) { return {chunk, second}; }
  // Of codes of 4 or 6 bits.
  static_assert(4 * kLargestCode6 * kLargestX <= kInt16Max);
  template <class AnyCodes>
  static Sums multiply_add(
      Sums sums, AnyCodes const& codes, int8_t const* x, Steps steps, Steps high_steps) {
    const __m512i low = _mm512_dpbusd_epi32(zero(), codes.low, _mm512_loadu_si512(x));
    const __m512i high = _mm512_dpbusd_epi32(zero(), codes.high, _mm512_loadu_si512(x + kChunk));
    return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums, low, steps), high, high_steps);
  }
  static Sums multiply_add(Sums sums, Codes6 const& codes, int8_t const* x, Steps steps) {
    return multiply_add(sums, codes, x, steps, steps);
  }

  using Int8s = __m512i;
  static constexpr bool kInt8sAreBiased = true;
  static Int8s int8s(uint8_t const* chunk) {
    return _mm512_xor_si512(_mm512_loadu_si512(chunk), _mm512_set1_epi8(-128));
  }
  static Sums multiply_add(Sums sums, Int8s weights, int8_t const* x) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_loadu_si512(x));
  }

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

  static constexpr int kDecodedBand = kTileBytes;
  static constexpr int kDepthOfMost = 8;  // sums are loaded and stored half as often
  static constexpr auto arrange = arrange_tile<Avx512Vnni>;
  static constexpr int kToken = kGroup;

  static void decode_band(uint8_t const* chunks, uint8_t const* params, uint8_t* to) {
    const Grid512 grid(params);
    decode_band512(chunks, grid, grid, to);
  }

  static void decode_band32(uint8_t const* chunks,
                            uint8_t const* params,
                            uint8_t const* high_params,
                            uint8_t* to) {
    decode_band512(chunks, Grid512(params), Grid512(high_params), to);
  }

  static void decode_band6(uint8_t const* chunks,
                           uint8_t const* second,
                           uint8_t const* params,
                           uint8_t* to) {
    decode_band6_512(chunks, second, params, to);
  }

  static void arrange_band(uint8_t const* chunks, uint8_t* to) { arrange_band512(chunks, to); }

  static int32_t sum(int8_t const* row, int64_t count) { return sum512(row, count); }

  // T tokens times B bands: T * B sums, B weights and one word of x are registers.
  template <int B, int T>
  [[gnu::noinline]] static void multiply_part(
      uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
    constexpr int kWords = B == kPanelBands ? 4 : 1;  // fewer bands would be spilled
    __m512i part[T][B];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
        part[t][b] = _mm512_load_si512(sums + kPanel * t + kBand * b);
    }
    for (int d = 0; d < depth; ++d) {
      ahead.step();
#pragma GCC unroll 1
      for (int first = 0; first < kGroup; first += 4 * kWords) {
#pragma GCC unroll 8
        for (int k = first; k < first + 4 * kWords; k += 4) {
          __m512i w[B];
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b)
            w[b] = _mm512_load_si512(weights + b * kTileBytes + kBand * k);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
            add_products(part[t], w, x + kGroup * t + k);
        }
      }
      weights += kPanelBands * kDecodedBand;
      x += kTileBytes;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
        _mm512_store_si512(sums + kPanel * t + kBand * b, part[t][b]);
    }
  }

  // A part has all bands.
  static int steps_of(int /*bands*/, int tokens) { return parts_of(tokens); }

  static void multiply(int bands,
                       uint8_t const* weights,
                       int8_t const* x,
                       int tokens,
                       int depth,
                       int32_t* sums,
                       Lines& ahead) {
    switch (bands) {
      case 1:
        return multiply_parts<Part<1>>(weights, x, tokens, depth, sums, ahead);
      case 2:
        return multiply_parts<Part<2>>(weights, x, tokens, depth, sums, ahead);
      case 3:
        return multiply_parts<Part<3>>(weights, x, tokens, depth, sums, ahead);
      default:
        return multiply_parts<Part<4>>(weights, x, tokens, depth, sums, ahead);
    }
  }

  template <int B>
  struct Part {
    static constexpr int kToken = kGroup;

    template <int T>
    static void multiply(
        uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
      multiply_part<B, T>(weights, x, depth, sums, ahead);
    }
  };
};

}  // namespace
}  // namespace liquidgemm::cpu
