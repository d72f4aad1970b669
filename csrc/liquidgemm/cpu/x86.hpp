// Vector operations that the instruction sets of x86 share: all of them have AVX2.
#pragma once

#include <immintrin.h>

#include "liquidgemm/cpu/codes.hpp"

namespace liquidgemm::cpu {
namespace {

inline __m256i load256(void const* from) {
  return _mm256_loadu_si256(static_cast<__m256i const*>(from));
}
inline void store256(void* to, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}
inline int32_t load_word(void const* from) {
  int32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}
inline __m256i add_at(int32_t const* rows, __m256i value) {
  return _mm256_add_epi32(load256(rows), value);
}

// (s[g], 0, s[g + 8], 0, ...) as 16-bit numbers, from the word (s[g], a[g], s[g + 8], a[g + 8]).
inline __m256i steps256(uint8_t const* params) {
  const __m128i order = _mm_setr_epi8(0, -1, -1, -1, 2, -1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1);
  return _mm256_shuffle_epi8(_mm256_set1_epi32(load_word(params)),
                             _mm256_broadcastsi128_si256(order));
}

// a * sum of the 16 rows of a band. A 32-bit lane of `offsets` is (a[g], a[g + 8]); multiplied by
// (sum, 0) it is the product of row g, by (0, sum) that of row g + 8.
inline void add_offsets256(uint8_t const* params, int32_t sum, int32_t* rows) {
  const __m256i offsets = _mm256_srli_epi16(load256(params), 8);
  const __m256i of_g = _mm256_madd_epi16(offsets, _mm256_set1_epi32(sum & 0xffff));
  const __m256i of_g8 = _mm256_madd_epi16(offsets, _mm256_set1_epi32(int32_t(uint32_t(sum) << 16)));
  store256(rows, add_at(rows, of_g));
  store256(rows + 8, add_at(rows + 8, of_g8));
}

// Adds a band's sums to its rows. `quad(g)` is four lanes of chunk g that remain to be added: two
// of row g, two of row g + 8.
template <class Quad>
void fold_quads(Quad quad, int32_t* rows) {
  __m128i even[2], odd[2];
  for (int i = 0; i < 2; ++i) {
    __m128i pairs[2];
    for (int j = 0; j < 2; ++j) {
      const __m128i a = quad(4 * i + 2 * j), b = quad(4 * i + 2 * j + 1);
      pairs[j] = _mm_add_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
    }
    const __m128 low = _mm_castsi128_ps(pairs[0]), high = _mm_castsi128_ps(pairs[1]);
    even[i] = _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
    odd[i] = _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)));
  }
  store256(rows, add_at(rows, _mm256_set_m128i(even[1], even[0])));
  store256(rows + 8, add_at(rows + 8, _mm256_set_m128i(odd[1], odd[0])));
}

inline __m128i quad_of(__m256i sums) {
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

inline int32_t sum_of(__m256i sums) {
  const __m128i quad = quad_of(sums);
  const __m128i pair = _mm_add_epi32(quad, _mm_unpackhi_epi64(quad, quad));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 1)));
}

// 6-bit codes of half a chunk: those of the low six bits, and the others.
struct Codes6Of32Bytes {
  __m256i low, high;

  Codes6Of32Bytes(uint8_t const* chunk, uint8_t const* second) {
    const auto masked = [](__m256i words, int mask) {
      return _mm256_and_si256(words, _mm256_set1_epi8(char(mask)));
    };
    const __m256i words = load256(chunk);  // w0 and w1 of every four
    const __m256i w0 = _mm256_unpacklo_epi64(words, words);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<__m128i const*>(second));
    const __m256i w2 = _mm256_permute4x64_epi64(_mm256_castsi128_si256(half), 0x50);
    const __m256i fourth =
        _mm256_or_si256(_mm256_or_si256(masked(_mm256_srli_epi16(w0, 2), 0x30),
                                        masked(_mm256_srli_epi16(words, 4), 0x0c)),
                        masked(_mm256_srli_epi16(w2, 6), 0x03));
    low = masked(words, 0x3f);
    high = _mm256_blend_epi32(masked(w2, 0x3f), fourth, 0xcc);
  }
};

// What sets with registers of 32 bytes share: a chunk is two registers, low and high nibbles each.
struct X86With32Bytes {
  static constexpr int kTokens = 8;
  static constexpr int kDepthOfMost = 4;
  using Sums = __m256i;
  struct Codes {
    __m256i low[2], high[2];
  };
  using Steps = __m256i;

  static Sums zero() { return _mm256_setzero_si256(); }

  static Codes codes(uint8_t const* chunk) {
    const __m256i nibble = _mm256_set1_epi8(15);
    Codes result;
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = load256(chunk + 32 * i);
      result.low[i] = _mm256_and_si256(bytes, nibble);
      result.high[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    }
    return result;
  }

  // Their products fill 16 bits sooner.
  struct Codes6 {
    __m256i low[2], high[2];
  };
  static Codes6 codes6(uint8_t const* chunk, uint8_t const* second) {
    Codes6 result;
    for (int i = 0; i < 2; ++i) {
      const Codes6Of32Bytes half(chunk + 32 * i, second + 16 * i);
      result.low[i] = half.low;
      result.high[i] = half.high;
    }
    return result;
  }

  static Steps steps(uint8_t const* params) { return steps256(params); }

  static void add_offsets(uint8_t const* params, int32_t sum, int32_t* rows) {
    add_offsets256(params, sum, rows);
  }

  static void fold(Sums const* sums, int stride, int32_t* rows) {
    fold_quads([&](int g) { return quad_of(sums[g * stride]); }, rows);
  }
};

}  // namespace
}  // namespace liquidgemm::cpu
