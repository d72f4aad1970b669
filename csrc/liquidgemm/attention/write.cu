// Quantizes keys and values and writes them to the cache: a warp per head and four tokens.
//
// Every operation is that of liquidgemm/kv/format.py, rounded alike: the codes of a CPU, to the
// bit.

#include "liquidgemm/attention/launch.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/kv.hpp"

namespace liquidgemm {
namespace attention {
namespace {

constexpr int kWarps = 4;
constexpr int kTogether = 4;  // tokens whose values lie byte by byte

// The least bfloat16 that is not below x >= 0, as a float.
CUTE_DEVICE float bf16_not_below(float x) {
  return x == x ? __uint_as_float((__float_as_uint(x) + 0xffffu) & 0xffff0000u) : x;
}

CUTE_DEVICE float warp_min(float value) {
  return -warp_max(-value);
}

// What is stored of a row: bytes of codes, element lane + 32 * i of the bytes in codes[i], and its
// scale and zero point.
template <int kHeld>
struct Coded {
  uint8_t codes[kHeld];
  float scale;
  int zero = 0;
};

template <int kHeld>
CUTE_DEVICE Coded<kHeld> code_int8(float const (&x)[kHeld], bool finite) {
  float most = 0;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    most = fmaxf(most, fabsf(x[i]));
  Coded<kHeld> coded;
  coded.scale = bf16_not_below(rounded::divide(warp_max(most), 127.f));
  const bool usable = finite && coded.scale > 0;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const float code = usable ? rintf(rounded::divide(x[i], coded.scale)) : 0.f;
    coded.codes[i] = static_cast<uint8_t>(static_cast<int>(fminf(fmaxf(code, -127.f), 127.f)));
  }
  return coded;
}

template <int kHeld>
CUTE_DEVICE Coded<kHeld / 2> code_int4(float const (&x)[kHeld], bool finite) {
  float low = 0, high = 0;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    low = fminf(low, x[i]);
    high = fmaxf(high, x[i]);
  }
  low = warp_min(low);
  Coded<kHeld / 2> coded;
  coded.scale = bf16_not_below(rounded::divide(rounded::add(warp_max(high), -low), 15.f));
  const bool usable = finite && coded.scale > 0;
  const float zero = usable ? rintf(rounded::divide(-low, coded.scale)) : 0.f;
  coded.zero = static_cast<int>(zero);
  const auto code = [&](float value) {
    const float at = usable ? rounded::add(rintf(rounded::divide(value, coded.scale)), zero) : 0.f;
    return static_cast<uint32_t>(fminf(fmaxf(at, 0.f), 15.f));
  };
  CUTE_UNROLL
  for (int i = 0; i < kHeld / 2; ++i)
    coded.codes[i] = static_cast<uint8_t>(code(x[i]) | code(x[i + kHeld / 2]) << 4);
  return coded;
}

template <KvFormat kFormat, int kHeadDim, bool kOfValues>
CUTE_DEVICE void write_four(KvWriteArguments const& a, int b, int h, int first) {
  constexpr bool kInt4 = kFormat == KvFormat::kInt4;
  constexpr int kHeld = kHeadDim / 32, kBytes = kInt4 ? kHeld / 2 : kHeld, kWidth = 32 * kBytes;
  const int lane = threadIdx.x % 32;
  const int length = a.cache.lengths[b];
  auto* const codes = static_cast<uint8_t*>(kOfValues ? a.cache.v : a.cache.k);
  void* const params = kOfValues ? a.cache.v_params : a.cache.k_params;
  uint32_t words[kBytes] = {};
  bool all = true;
  const int64_t row = cache_row(a.cache, b, h, first);
#pragma unroll 1
  for (int i = 0; i < kTogether; ++i) {
    const int token = first + i, index = token - (length - a.tokens);
    if (index < 0 || index >= a.tokens) {
      all = false;
      continue;
    }
    int64_t const* const stride = kOfValues ? a.v_stride : a.k_stride;
    float x[kHeld];
    load_row(x,
             element_at(kOfValues ? a.v : a.k, b * stride[0] + index * stride[1] + h * stride[2],
                        a.type),
             a.type);
    if (!kOfValues && a.center != nullptr) {
      const int64_t at = static_cast<int64_t>(a.center_per_sequence ? b : 0) * a.cache.heads + h;
      CUTE_UNROLL
      for (int j = 0; j < kHeld; ++j)
        x[j] = rounded::add(x[j], -a.center[at * kHeadDim + lane + 32 * j]);
    }
    const bool finite = all_finite(x);
    if constexpr (kInt4 || !kOfValues)
      rotate(x);
    Coded<kBytes> coded;
    if constexpr (kInt4)
      coded = code_int4(x, finite);
    else
      coded = code_int8(x, finite);
    CUTE_UNROLL
    for (int j = 0; j < kBytes; ++j) {
      if constexpr (kOfValues)
        words[j] |= static_cast<uint32_t>(coded.codes[j]) << 8 * i;
      else
        codes[(row + i) * kWidth + lane + 32 * j] = coded.codes[j];
    }
    if (lane == 0) {
      const uint32_t scale = finite ? __float_as_uint(coded.scale) : 0x7fc00000u;
      if constexpr (kInt4)
        static_cast<uint32_t*>(params)[row + i] = (scale & 0xffff0000u) | coded.zero;
      else
        static_cast<uint16_t*>(params)[row + i] = static_cast<uint16_t>(scale >> 16);
    }
  }
  if constexpr (kOfValues) {
    CUTE_UNROLL
    for (int j = 0; j < kBytes; ++j) {
      uint8_t* const to = codes + row * kWidth + kTogether * (lane + 32 * j);
      if (all) {
        *reinterpret_cast<uint32_t*>(to) = words[j];
        continue;
      }
      CUTE_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int index = first + i - (length - a.tokens);
        if (index >= 0 && index < a.tokens)
          to[i] = static_cast<uint8_t>(words[j] >> 8 * i);
      }
    }
  }
}

template <KvFormat kFormat, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps)
    write_kernel(const __grid_constant__ KvWriteArguments a) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int index = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= 2 * a.cache.heads)
    return;
  const int b = blockIdx.z, h = index / 2;
  // Fours are those of positions in the sequence, and so of a page.
  const int begin = max(a.cache.lengths[b] - a.tokens, 0);
  const int first = (begin / kTogether + static_cast<int>(blockIdx.y)) * kTogether;
  if (first >= min(a.cache.lengths[b], a.cache.capacity))
    return;
  if (index % 2)
    write_four<kFormat, kHeadDim, true>(a, b, h, first);
  else
    write_four<kFormat, kHeadDim, false>(a, b, h, first);
}

template <KvFormat kFormat, int kHeadDim>
cudaError_t launch(KvWriteArguments const& a, cudaStream_t stream) {
  // As many fours as so many tokens may touch.
  const dim3 grid(static_cast<unsigned>(ceil_div(2 * a.cache.heads, kWarps)),
                  static_cast<unsigned>(ceil_div(a.tokens + kTogether - 1, kTogether)),
                  static_cast<unsigned>(a.batch));
  return launch_early(write_kernel<kFormat, kHeadDim>, {.grid = grid, .threads = 32 * kWarps},
                      stream, a);
}

template <KvFormat kFormat>
cudaError_t launch(KvWriteArguments const& a, cudaStream_t stream) {
  return for_head_dim(a.cache.head_dim, [&](auto head_dim) {
    return launch<kFormat, decltype(head_dim)::value>(a, stream);
  });
}

}  // namespace
}  // namespace attention

cudaError_t kv_write(KvWriteArguments const& a, cudaStream_t stream) {
  if (a.batch == 0 || a.tokens == 0 || a.cache.heads == 0)
    return cudaSuccess;
  return a.cache.format == KvFormat::kInt8 ? attention::launch<KvFormat::kInt8>(a, stream)
                                           : attention::launch<KvFormat::kInt4>(a, stream);
}

}  // namespace liquidgemm
