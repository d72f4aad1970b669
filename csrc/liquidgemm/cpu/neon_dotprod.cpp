#include "liquidgemm/cpu/neon.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {

Kernels const* neon_dotprod_kernels() {
  static constexpr Kernels kernels{"neon_dotprod",
                                   always(product_by_codes<NeonDotprod>()),
                                   always(product_by_codes<NeonDotprod, Bytes>()),
                                   always(product_by_codes<NeonDotprod, SixBits>()),
                                   always(product_by_codes<NeonDotprod, Groups32>()),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
