// From integer sums to results: float32 operations, each rounded separately (the build turns
// contraction off), in the order of the formula, and one cast.
#pragma once

#include "liquidgemm/cpu/activation.hpp"

namespace liquidgemm::cpu {
namespace {

template <class T, class Cast>
void store(
    Output const& out, int64_t token, int64_t first, int count, int32_t const* sums, Cast cast) {
  T* const y = static_cast<T*>(out.y) + token * out.n + first;
  const float x_scale = out.x_scale[token];
  float const* const weight_scale = out.weight_scale + first;
  if (out.bias == nullptr) {
    for (int i = 0; i < count; ++i)
      y[i] = cast(float(sums[i]) * x_scale * weight_scale[i]);
  } else {
    float const* const bias = out.bias + first;
    for (int i = 0; i < count; ++i)
      y[i] = cast(float(sums[i]) * x_scale * weight_scale[i] + bias[i]);
  }
}

// Columns [first, first + count) of y, those below n, of one token.
inline void store_row(
    Output const& out, int64_t token, int64_t first, int64_t count, int32_t const* sums) {
  const int inside = int(smaller(count, out.n - first));
  switch (out.type) {
    case Element::kBFloat16:
      return store<BFloat16>(out, token, first, inside, sums,
                             [](float value) { return to_bfloat16(value); });
    case Element::kFloat16:
      return store<Float16>(out, token, first, inside, sums,
                            [](float value) { return to_float16(value); });
    case Element::kFloat32:
      return store<float>(out, token, first, inside, sums, [](float value) { return value; });
    default:
      if (inside > 0)
        memcpy(static_cast<int32_t*>(out.y) + token * out.n + first, sums,
               sizeof(int32_t) * size_t(inside));
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
