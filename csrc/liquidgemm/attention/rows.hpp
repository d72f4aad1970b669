// A row of head_dim numbers in the registers of a warp, and where rows of a cache lie.
#pragma once

#include <cuda_fp16.h>

#include "liquidgemm/attention/arguments.hpp"
#include "liquidgemm/common/rounded.hpp"

namespace liquidgemm::attention {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Element lane + 32 * i of the row is held[i].
template <int kHeld>
CUTE_DEVICE void load_row(float (&held)[kHeld], void const* row, Element type) {
  const int lane = threadIdx.x % 32;
  if (type == Element::kFloat32) {
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      held[i] = static_cast<float const*>(row)[lane + 32 * i];
    return;
  }
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const uint16_t bits = static_cast<uint16_t const*>(row)[lane + 32 * i];
    held[i] = type == Element::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                         : __half2float(__ushort_as_half(bits));
  }
}

CUTE_HOST_DEVICE constexpr int bytes_of(Element type) {
  return type == Element::kFloat32 ? 4 : 2;
}

CUTE_DEVICE void const* element_at(void const* data, int64_t index, Element type) {
  return static_cast<char const*>(data) + index * bytes_of(type);
}

// The product with the Hadamard matrix, in the order of `rotate` in liquidgemm/kv/format.py.
template <int kHeld>
CUTE_DEVICE void rotate(float (&held)[kHeld]) {
  CUTE_UNROLL
  for (int stride = kHeld / 2; stride > 0; stride /= 2) {
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (i & stride)
        continue;
      const float a = held[i], b = held[i + stride];
      held[i] = rounded::add(a, b);
      held[i + stride] = rounded::add(a, -b);
    }
  }
  CUTE_UNROLL
  for (int stride = 16; stride > 0; stride /= 2) {
    const bool second = threadIdx.x % 32 & stride;
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, held[i], stride);
      held[i] = rounded::add(second ? -held[i] : held[i], other);
    }
  }
}

CUTE_DEVICE float warp_max(float value) {
  CUTE_UNROLL
  for (int stride = 16; stride > 0; stride /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, stride));
  return value;
}

template <int kHeld>
CUTE_DEVICE bool all_finite(float const (&held)[kHeld]) {
  bool finite = true;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    finite = finite && fabsf(held[i]) < __int_as_float(0x7f800000);
  return __all_sync(kAllLanes, finite);
}

// Which row of the whole cache holds this token of sequence b and head h: the index of its
// parameters, and of head_dim codes.
CUTE_DEVICE int64_t cache_row(KvCache const& cache, int b, int h, int token) {
  int64_t page = b;
  if (cache.block_table != nullptr) {
    const int index = token / cache.page_tokens;
    page = cache.block_table[static_cast<int64_t>(b) * cache.table_stride + index];
    token -= index * cache.page_tokens;
  }
  return (page * cache.heads + h) * cache.page_tokens + token;
}

}  // namespace liquidgemm::attention
