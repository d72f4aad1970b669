// A band of one group to bytes, with AVX-512: words of 16 rows side by side.
#pragma once

#include "liquidgemm/cpu/bytes.hpp"
#include "liquidgemm/cpu/x86.hpp"

namespace liquidgemm::cpu {
namespace {

// Adds to the sums of a token, one register for each band, the products of unsigned bytes with a
// word of its x. The intrinsics would do, but GCC 12 copies their sums from one register to
// another; so it does with one statement per instruction where there are 20 sums, of four bands.
template <int B>
void add_products(__m512i (&sums)[B], __m512i const (&weights)[B], int8_t const* x) {
  using Word [[gnu::aligned(1), gnu::may_alias]] = int32_t;
  Word const& word = *reinterpret_cast<Word const*>(x);
  if constexpr (B == 4) {
    __m512i words;
    __asm__(
        "vpbroadcastd %5, %4\n\t"
        "vpdpbusd %4, %6, %0\n\t"
        "vpdpbusd %4, %7, %1\n\t"
        "vpdpbusd %4, %8, %2\n\t"
        "vpdpbusd %4, %9, %3"
        : "+v"(sums[0]), "+v"(sums[1]), "+v"(sums[2]), "+v"(sums[3]), "=&v"(words)
        : "m"(word), "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "v"(weights[3]));
  } else {
    const __m512i words = _mm512_set1_epi32(word);
    for (int b = 0; b < B; ++b)
      __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[b]) : "v"(weights[b]), "v"(words));
  }
}

// Eight chunks of eight pairs of words (rows g and g + 8) become eight registers of eight pairs:
// pairs within lanes of 16 bytes first, then those lanes.
inline void transpose_pairs(__m512i (&rows)[kBandChunks]) {
  __m512i of[kBandChunks];
  for (int i = 0; i < kBandChunks; i += 2) {
    of[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    of[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  for (int odd = 0; odd < 2; ++odd) {
    const __m512i low01 = _mm512_shuffle_i32x4(of[odd], of[2 + odd], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(of[odd], of[2 + odd], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(of[4 + odd], of[6 + odd], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(of[4 + odd], of[6 + odd], 0xee);
    rows[odd] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[2 + odd] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[4 + odd] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[6 + odd] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// 6-bit codes of a chunk: those of the low six bits, and the others.
struct Codes6Of64Bytes {
  __m512i low, high;

  Codes6Of64Bytes(uint8_t const* chunk, uint8_t const* second) {
    const auto masked = [](__m512i words, int mask) {
      return _mm512_and_si512(words, _mm512_set1_epi8(char(mask)));
    };
    const __m512i words = _mm512_loadu_si512(chunk);  // w0 and w1 of every four
    const __m512i w0 = _mm512_unpacklo_epi64(words, words);
    const __m512i w2 = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                _mm512_castsi256_si512(load256(second)));
    const __m512i fourth =
        _mm512_or_si512(_mm512_or_si512(masked(_mm512_srli_epi16(w0, 2), 0x30),
                                        masked(_mm512_srli_epi16(words, 4), 0x0c)),
                        masked(_mm512_srli_epi16(w2, 6), 0x03));
    low = masked(words, 0x3f);
    high = _mm512_mask_blend_epi64(0xaa, masked(w2, 0x3f), fourth);
  }
};

// Of a band. A code times s fits a byte, so that a 16-bit product of two codes does not carry from
// one into the other.
struct Grid512 {
  __m512i s, a;

  explicit Grid512(uint8_t const* params) {
    const __m128i step_order =
        _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1);
    const __m128i offset_order = _mm_setr_epi8(1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13);
    const __m512i words = _mm512_cvtepu16_epi32(load256(params));  // (s, a, 0, 0) of a lane's row
    s = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(step_order));
    a = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(offset_order));
  }
  __m512i decode(__m512i codes) const { return _mm512_add_epi8(_mm512_mullo_epi16(codes, s), a); }
};

inline void decode_band512(uint8_t const* chunks,
                           Grid512 const& of_low,
                           Grid512 const& of_high,
                           uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i pairs[kBandChunks];
  for (int i = 0; i < kBandChunks; ++i)
    pairs[i] = _mm512_loadu_si512(chunks + kChunk * i);
  transpose_pairs(pairs);
  for (int i = 0; i < kBandChunks; ++i) {
    const __m512i low = _mm512_and_si512(pairs[i], nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs[i], 4), nibble);
    uint8_t* const quad = to + 4 * kBand * quad_of_pair(i);
    _mm512_store_si512(quad, of_low.decode(low));
    _mm512_store_si512(quad + kTileBytes / 2, of_high.decode(high));
  }
}

inline void decode_band6_512(uint8_t const* chunks,
                             uint8_t const* second,
                             uint8_t const* params,
                             uint8_t* to) {
  const Grid512 grid(params);
  __m512i low[kBandChunks], high[kBandChunks];
  for (int i = 0; i < kBandChunks; ++i) {
    const Codes6Of64Bytes codes(chunks + kChunk * i, second + kChunk / 2 * i);
    low[i] = codes.low;
    high[i] = codes.high;
  }
  transpose_pairs(low);
  transpose_pairs(high);
  for (int i = 0; i < kBandChunks; ++i) {
    uint8_t* const quad = to + 4 * kBand * quad_of_pair(i);
    _mm512_store_si512(quad, grid.decode(low[i]));
    _mm512_store_si512(quad + kTileBytes / 2, grid.decode(high[i]));
  }
}

// INT8 weights plus 128.
inline void arrange_band512(uint8_t const* chunks, uint8_t* to) {
  const __m512i bias = _mm512_set1_epi8(-128);
  for (int half = 0; half < 2; ++half) {
    __m512i pairs[kBandChunks];
    for (int i = 0; i < kBandChunks; ++i)
      pairs[i] = _mm512_loadu_si512(chunks + kHigh * half + kChunk * i);
    transpose_pairs(pairs);
    for (int i = 0; i < kBandChunks; ++i)
      _mm512_store_si512(to + half * kTileBytes / 2 + 4 * kBand * quad_of_pair(i),
                         _mm512_xor_si512(pairs[i], bias));
  }
}

inline int32_t sum512(int8_t const* row, int64_t count) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64)
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(row + i));
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace
}  // namespace liquidgemm::cpu
