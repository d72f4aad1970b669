// Bytes of 32-bit words, on host and device.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm {

// PRMT without its sign mode: nibble i of the selector names the byte of (b, a) that becomes byte
// i.
CUTE_HOST_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
#endif
}

}  // namespace liquidgemm
