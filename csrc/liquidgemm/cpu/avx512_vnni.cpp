#include "liquidgemm/cpu/avx512_vnni.hpp"

#include "liquidgemm/cpu/bytes.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {

Kernels const* avx512_vnni_kernels() {
  static constexpr int64_t kFewestTokens = 5;
  static constexpr Kernels kernels{"avx512_vnni",
                                   products<Avx512Vnni, Nibbles>(kFewestTokens),
                                   products<Avx512Vnni, Bytes>(kFewestTokens),
                                   products<Avx512Vnni, SixBits>(kFewestTokens),
                                   products<Avx512Vnni, Groups32>(kFewestTokens),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
