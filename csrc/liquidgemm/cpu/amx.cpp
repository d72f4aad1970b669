#include "liquidgemm/cpu/avx512_vnni.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {

Kernels const* amx_kernels() {
  static constexpr Product by_codes = product_by_codes<Avx512Vnni>();
  static constexpr Kernels kernels{"amx", by_codes, by_codes, INT64_MAX, quantize};
  return &kernels;
}

}  // namespace liquidgemm::cpu
