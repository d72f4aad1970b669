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

// One group of a band, to [k / 4][16 lanes][4 k] bytes. `decode(codes, half)` makes bytes of the
// codes of one word of half a band's rows.
template <class Decode>
void decode_lanes(uint8_t const* chunks, uint8_t* to, Decode decode) {
  const __m256i nibble = _mm256_set1_epi8(15);
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
        const __m256i low = _mm256_and_si256(pair, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), nibble);
        uint8_t* const quad = to + 4 * kBand * quad_of_pair(4 * half + i) + 8 * g;
        store256(quad, decode(low, g / 4));
        store256(quad + kTileBytes / 2, decode(high, g / 4));
      }
    }
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
