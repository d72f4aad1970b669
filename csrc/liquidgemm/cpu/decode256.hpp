// The codes of a band as lanes of one row each, in registers of 32 bytes.
#pragma once

#include "liquidgemm/cpu/bytes.hpp"
#include "liquidgemm/cpu/x86.hpp"

namespace liquidgemm::cpu {
namespace {

// (s, a) of half a band's rows, as bytes 0 and 1 of their lanes.
inline __m256i words_of_lanes(uint8_t const* params) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(params)));
}

// The words of a band's chunks as lanes of one row each: `store(word, half, at)` takes one word of
// half a band's rows, which belongs to byte `at` of [k / 4][16 lanes][4 k].
template <class Store>
void transpose_words(uint8_t const* chunks, Store store) {
  for (int g = 0; g < kBandChunks; g += 4) {  // rows g ... g + 3 and 8 later: half a band
    for (int half = 0; half < 2; ++half) {    // of a chunk: four pairs of words
      __m256i rows[4], of[4];
      for (int i = 0; i < 4; ++i)
        rows[i] = load256(chunks + kChunk * (g + i) + 32 * half);
      for (int i = 0; i < 4; i += 2) {
        of[i] = _mm256_unpacklo_epi64(rows[i], rows[i + 1]);
        of[i + 1] = _mm256_unpackhi_epi64(rows[i], rows[i + 1]);
      }
      for (int i = 0; i < 4; ++i) {
        const int odd = i % 2;
        const __m256i pair = i / 2 == 0 ? _mm256_permute2x128_si256(of[odd], of[2 + odd], 0x20)
                                        : _mm256_permute2x128_si256(of[odd], of[2 + odd], 0x31);
        store(pair, g / 4, 4 * kBand * quad_of_pair(4 * half + i) + 8 * g);
      }
    }
  }
}

// Of sets that multiply one band at a time: a part is some tokens times a band.
template <class Simd>
struct BandByBand {
  static int steps_of(int bands, int tokens) { return bands * parts_of(tokens); }

  static void multiply(int bands,
                       uint8_t const* weights,
                       int8_t const* x,
                       int tokens,
                       int depth,
                       int32_t* sums,
                       Lines& ahead) {
    for (int b = 0; b < bands; ++b)
      multiply_parts<Simd>(weights + b * Simd::kDecodedBand, x, tokens, depth, sums + kBand * b,
                           ahead);
  }
};

// One group of a band, to [k / 4][16 lanes][4 k] bytes. `decode(codes, half, nibble)` makes
// bytes of the codes, from the low (0) or the high nibbles, of one word of half a band's rows.
template <class Decode>
void decode_lanes(uint8_t const* chunks, uint8_t* to, Decode decode) {
  const __m256i nibble = _mm256_set1_epi8(15);
  transpose_words(chunks, [&](__m256i codes, int half, int at) {
    store256(to + at, decode(_mm256_and_si256(codes, nibble), half, 0));
    store256(to + kTileBytes / 2 + at,
             decode(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), half, 1));
  });
}

// INT8 weights plus 128.
inline void arrange_band256(uint8_t const* chunks, uint8_t* to) {
  const __m256i bias = _mm256_set1_epi8(-128);
  for (int high = 0; high < 2; ++high) {
    transpose_words(chunks + kHigh * high, [&](__m256i weights, int, int at) {
      store256(to + high * kTileBytes / 2 + at, _mm256_xor_si256(weights, bias));
    });
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
