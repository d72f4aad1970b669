// AVX2: products of bytes in pairs of 16 bits (vpmaddubsw), which saturate at 32 767.
#include "liquidgemm/cpu/sets.hpp"
#include "liquidgemm/cpu/x86.hpp"

namespace liquidgemm::cpu {
namespace {

struct Avx2 : X86With32Bytes {
  // A half has two products of each of the chunk's four registers of codes.
  static_assert(8 * kLargestCode * kLargestX <= kInt16Max);

  // (s[g], s[g], s[g + 8], s[g + 8], ...): a word has two halves to be multiplied.
  static Steps steps(uint8_t const* params) {
    const __m128i order = _mm_setr_epi8(0, -1, 0, -1, 2, -1, 2, -1, 0, -1, 0, -1, 2, -1, 2, -1);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(load_word(params)),
                               _mm256_broadcastsi128_si256(order));
  }

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(codes.low[0], load256(x)),
                                         _mm256_maddubs_epi16(codes.low[1], load256(x + 32)));
    const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(codes.high[0], load256(x + 64)),
                                          _mm256_maddubs_epi16(codes.high[1], load256(x + 96)));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_add_epi16(low, high), steps));
  }
};

}  // namespace

Kernels const* avx2_kernels() {
  static constexpr Product by_codes = product_by_codes<Avx2>();
  static constexpr Kernels kernels{"avx2",   by_codes, by_codes, INT64_MAX,
                                   quantize, rms_norm, glu,      search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
