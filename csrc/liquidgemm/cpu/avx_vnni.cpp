// AVX-VNNI: four products of bytes per 32-bit lane (vpdpbusd), in registers of 32 bytes.
#include "liquidgemm/cpu/bytes.hpp"
#include "liquidgemm/cpu/sets.hpp"
#include "liquidgemm/cpu/x86.hpp"

namespace liquidgemm::cpu {
namespace {

struct AvxVnni : X86With32Bytes {
  // A lane has four products of each of the chunk's four registers of codes. Its upper 16 bits,
  // which are its sign, are multiplied by 0.
  static_assert(16 * kLargestCode * kLargestX <= kInt16Max);

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    __m256i products = _mm256_dpbusd_avx_epi32(zero(), codes.low[0], load256(x));
    products = _mm256_dpbusd_avx_epi32(products, codes.low[1], load256(x + 32));
    products = _mm256_dpbusd_avx_epi32(products, codes.high[0], load256(x + 64));
    products = _mm256_dpbusd_avx_epi32(products, codes.high[1], load256(x + 96));
    return _mm256_dpwssd_avx_epi32(sums, products, steps);
  }

  static constexpr int kFewestTokens = 32;
  static constexpr int kChunksAtOnce = 1;

  // A code times s fits a byte, so that a 16-bit product of two codes does not carry.
  static void decode(uint8_t const* chunk, uint8_t const* params, uint8_t* bytes) {
    const __m256i words = _mm256_set1_epi32(load_word(params));
    const __m128i step_order =
        _mm_setr_epi8(0, -1, 0, -1, 2, -1, 2, -1, 0, -1, 0, -1, 2, -1, 2, -1);
    const __m128i offset_order = _mm_setr_epi8(1, 1, 1, 1, 3, 3, 3, 3, 1, 1, 1, 1, 3, 3, 3, 3);
    const __m256i s = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(step_order));
    const __m256i a = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(offset_order));
    const Codes from = codes(chunk);
    for (int i = 0; i < 2; ++i) {
      store256(bytes + 32 * i, _mm256_add_epi8(_mm256_mullo_epi16(from.low[i], s), a));
      store256(bytes + kChunk + 32 * i, _mm256_add_epi8(_mm256_mullo_epi16(from.high[i], s), a));
    }
  }

  static Sums load(void const* bytes) { return load256(bytes); }

  static Sums dot(Sums sums, Sums weights, Sums x) {
    return _mm256_dpbusd_avx_epi32(sums, weights, x);
  }
};

}  // namespace

Kernels const* avx_vnni_kernels() {
  static constexpr Kernels kernels{"avx_vnni",
                                   product_by_codes<AvxVnni>(),
                                   product_by_bytes<AvxVnni>(),
                                   AvxVnni::kFewestTokens,
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
