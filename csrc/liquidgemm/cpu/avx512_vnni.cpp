#include "liquidgemm/cpu/avx512_vnni.hpp"

#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {

Kernels const* avx512_vnni_kernels() {
  static constexpr Product by_codes = product_by_codes<Avx512Vnni>();
  static constexpr Kernels kernels{"avx512_vnni", by_codes, by_codes, INT64_MAX, quantize, search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
