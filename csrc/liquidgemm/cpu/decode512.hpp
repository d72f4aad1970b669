// Weights decoded to bytes q * s + a, for many tokens: what a byte costs is then shared by all of
// them, and a product takes one instruction instead of two. Bytes are unsigned, 128 too large; the
// sum of x times 128 is subtracted at the end.
#pragma once

#include "liquidgemm/cpu/avx512_vnni.hpp"

namespace liquidgemm::cpu {
namespace {

// What has been written is in memory, and what is read comes from there. GCC's tile loads and
// stores are assembly that does not say which memory it touches.
inline void fence() {
  __asm__ volatile("" ::: "memory");
}

// s and a of the 16 rows of a band: s in both halves of a word, a in all bytes of it.
struct BandParams {
  alignas(32) int32_t steps[2][kBandChunks], offsets[2][kBandChunks];  // of rows g, of rows g + 8

  explicit BandParams(uint8_t const* params) {
    const __m256i words = load256(params);
    for (int half = 0; half < 2; ++half) {
      const char s = char(2 * half), a = char(2 * half + 1);
      const auto shuffled = [&](char b0, char b1, char b2, char b3) {
        const auto of = [](char byte, int word) { return char(byte < 0 ? byte : byte + 4 * word); };
        const __m128i order = _mm_setr_epi8(
            of(b0, 0), of(b1, 0), of(b2, 0), of(b3, 0), of(b0, 1), of(b1, 1), of(b2, 1), of(b3, 1),
            of(b0, 2), of(b1, 2), of(b2, 2), of(b3, 2), of(b0, 3), of(b1, 3), of(b2, 3), of(b3, 3));
        return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
      };
      store256(steps[half], shuffled(s, -1, s, -1));
      store256(offsets[half], shuffled(a, a, a, a));
    }
    fence();  // a word that is loaded is broadcast for nothing, one in a register is not
  }
};

// A code times s fits a byte, so that a 16-bit product of two codes does not carry from one into
// the other.
inline __m512i decode(__m512i codes, int32_t steps, int32_t offsets) {
  return _mm512_add_epi8(_mm512_mullo_epi16(codes, _mm512_set1_epi32(steps)),
                         _mm512_set1_epi32(offsets));
}

}  // namespace
}  // namespace liquidgemm::cpu
