// From integer sums to results: float32 operations, each rounded separately (the build turns
// contraction off), in the order of the formula, and one cast.
#pragma once

#include "liquidgemm/cpu/activation.hpp"

namespace liquidgemm::cpu {
namespace {

template <class T, class Cast>
void scale(Output const& out,
           int64_t token,
           int64_t first,
           int count,
           int32_t const* sums,
           T* y,
           Cast cast) {
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

// Columns [first, first + count) of y, those below n, of one token; count is at most kPanel.
inline void store_row(
    Output const& out, int64_t token, int64_t first, int64_t count, int32_t const* sums) {
  const int inside = int(smaller(count, out.n - first));
  if (inside <= 0)
    return;
  const int64_t at = token * out.n + first;
  const auto as_it_is = [](float value) { return value; };
  switch (out.type) {
    case Element::kBFloat16:
      return scale(out, token, first, inside, sums, static_cast<BFloat16*>(out.y) + at,
                   [](float value) { return to_bfloat16(value); });
    case Element::kFloat16: {
      float values[kPanel];
      scale(out, token, first, inside, sums, values, as_it_is);
      return to_float16s(values, inside, static_cast<Float16*>(out.y) + at);
    }
    case Element::kFloat32:
      return scale(out, token, first, inside, sums, static_cast<float*>(out.y) + at, as_it_is);
    default:
      memcpy(static_cast<int32_t*>(out.y) + at, sums, sizeof(int32_t) * size_t(inside));
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
