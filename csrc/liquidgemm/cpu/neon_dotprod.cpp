#include "liquidgemm/cpu/neon.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {

Kernels const* neon_dotprod_kernels() {
  static constexpr Product by_codes = product_by_codes<NeonDotprod>();
  static constexpr Kernels kernels{"neon_dotprod", by_codes, by_codes, INT64_MAX,
                                   quantize,       rms_norm, glu,      search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
