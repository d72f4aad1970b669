// Shared memory as PTX instructions address it.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm {

// On the device; a compiler for the host alone has to accept its callers.
CUTE_DEVICE uint32_t shared_address([[maybe_unused]] void const* pointer) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return 0;
#endif
}

}  // namespace liquidgemm
