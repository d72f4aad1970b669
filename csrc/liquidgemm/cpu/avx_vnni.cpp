// AVX-VNNI: four products of bytes per 32-bit lane (vpdpbusd), in registers of 32 bytes.
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
};

}  // namespace

Kernels const* avx_vnni_kernels() {
  static constexpr Product by_codes = product_by_codes<AvxVnni>();
  static constexpr Kernels kernels{"avx_vnni", by_codes, by_codes, INT64_MAX, quantize, search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
