// Rows of the norm and of the gated activation, in plain C++ that the compiler vectorizes for each
// instruction set; each is quantized when it is complete. The arithmetic is that of
// liquidgemm/producers: separately rounded float32 operations in a fixed order.
#pragma once

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/common/norm.hpp"
#include "liquidgemm/cpu/activation.hpp"

namespace liquidgemm::cpu {
namespace {

constexpr int64_t kProducerPart = kSumLanes * kSumVector;  // elements that are worked on at a time

inline void from_floats(float const* from, int64_t count, float* to) {
  memcpy(to, from, size_t(count) * sizeof(float));
}
inline void from_floats(float const* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = to_bfloat16(from[i]);
}
inline void from_floats(float const* from, int64_t count, Float16* to) {
  to_float16s(from, count, to);
}

// Rounds to T and back.
template <class T>
void round_all(float* values, int64_t count) {
  if constexpr (!std::is_same_v<T, float>) {
    T rounded[kProducerPart];
    from_floats(values, count, rounded);
    to_floats(rounded, count, values);
  }
}

inline void weight_to_floats(
    void const* weight, Element type, int64_t first, int64_t count, float* to) {
  switch (type) {
    case Element::kBFloat16:
      return to_floats(static_cast<BFloat16 const*>(weight) + first, count, to);
    case Element::kFloat16:
      return to_floats(static_cast<Float16 const*>(weight) + first, count, to);
    default:
      return to_floats(static_cast<float const*>(weight) + first, count, to);
  }
}

// Adds the upper half to the lower one until one is left.
template <int kCount>
float sum_of_halves(float* values) {
  for (int half = kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      values[i] += values[i + half];
  }
  return values[0];
}

// The sum of squares of kProducerPart values.
inline float sum_of_squares(float const* values) {
  float lanes[kSumLanes];
  for (int lane = 0; lane < kSumLanes; ++lane) {
    float const* const v = values + lane * kSumVector;
    static_assert(kSumVector == 8);
    const float even = (v[0] * v[0] + v[4] * v[4]) + (v[2] * v[2] + v[6] * v[6]);
    const float odd = (v[1] * v[1] + v[5] * v[5]) + (v[3] * v[3] + v[7] * v[7]);
    lanes[lane] = even + odd;
  }
  return sum_of_halves<kSumLanes>(lanes);
}

template <class T>
float rms_norm_row(RmsNormRow const& row, int8_t* out) {
  T const* x = static_cast<T const*>(row.x);
  T const* const residual = static_cast<T const*>(row.residual);
  T* const h = static_cast<T*>(row.h);
  T* const y = static_cast<T*>(row.y);
  float chains[kSumChains] = {};
  float values[kProducerPart], others[kProducerPart];
  for (int64_t first = 0, group = 0; first < row.k; first += kProducerPart, ++group) {
    const int64_t count = smaller(kProducerPart, row.k - first);
    to_floats(x + first, count, values);
    if (residual != nullptr) {
      to_floats(residual + first, count, others);
      for (int64_t i = 0; i < count; ++i)
        values[i] += others[i];
      from_floats(values, count, h + first);
      to_floats(h + first, count, values);
    }
    for (int64_t i = count; i < kProducerPart; ++i)
      values[i] = 0;
    chains[group % kSumChains] += sum_of_squares(values);
  }
  const float mean = sum_of_halves<kSumChains>(chains) / float(row.k);
  const float root = rounded::square_root(mean + row.eps);
  const float factor = 1.f / root;
  if (residual != nullptr)
    x = h;
  for (int64_t first = 0; first < row.k; first += kProducerPart) {
    const int64_t count = smaller(kProducerPart, row.k - first);
    to_floats(x + first, count, values);
    weight_to_floats(row.weight, row.weight_type, first, count, others);
    for (int64_t i = 0; i < count; ++i)
      values[i] *= factor;
    if (row.mode == NormMode::kLlama) {
      round_all<T>(values, count);
      for (int64_t i = 0; i < count; ++i)
        values[i] *= others[i];
    } else {
      for (int64_t i = 0; i < count; ++i)
        values[i] *= row.offset + others[i];
    }
    from_floats(values, count, y + first);
  }
  return quantize_row(y, row.k, out);
}

inline float rms_norm(RmsNormRow const& row, int8_t* out) {
  switch (row.type) {
    case Element::kBFloat16:
      return rms_norm_row<BFloat16>(row, out);
    case Element::kFloat16:
      return rms_norm_row<Float16>(row, out);
    default:
      return rms_norm_row<float>(row, out);
  }
}

template <class T, GatedActivation kActivation>
float glu_row(GluRow const& row, int8_t* out) {
  T const* const gate_up = static_cast<T const*>(row.gate_up);
  T* const y = static_cast<T*>(row.y);
  float gates[kProducerPart], ups[kProducerPart];
  for (int64_t first = 0; first < row.k; first += kProducerPart) {
    const int64_t count = smaller(kProducerPart, row.k - first);
    to_floats(gate_up + first, count, gates);
    to_floats(gate_up + row.k + first, count, ups);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kActivation == GatedActivation::kSiluMul)
        gates[i] = silu(gates[i]);
      else if constexpr (kActivation == GatedActivation::kGeluTanhMul)
        gates[i] = gelu_tanh(gates[i]);
      else
        gates[i] = swiglu_gate(gates[i]);
    }
    round_all<T>(gates, count);
    if constexpr (kActivation == GatedActivation::kSwigluClamped) {
      for (int64_t i = 0; i < count; ++i)
        ups[i] = swiglu_up(ups[i]);
      round_all<T>(ups, count);
    }
    for (int64_t i = 0; i < count; ++i)
      gates[i] *= ups[i];
    from_floats(gates, count, y + first);
  }
  return quantize_row(y, row.k, out);
}

template <class T>
float glu_row_of(GluRow const& row, int8_t* out) {
  switch (row.activation) {
    case GatedActivation::kSiluMul:
      return glu_row<T, GatedActivation::kSiluMul>(row, out);
    case GatedActivation::kGeluTanhMul:
      return glu_row<T, GatedActivation::kGeluTanhMul>(row, out);
    default:
      return glu_row<T, GatedActivation::kSwigluClamped>(row, out);
  }
}

inline float glu(GluRow const& row, int8_t* out) {
  switch (row.type) {
    case Element::kBFloat16:
      return glu_row_of<BFloat16>(row, out);
    case Element::kFloat16:
      return glu_row_of<Float16>(row, out);
    default:
      return glu_row_of<float>(row, out);
  }
}

}  // namespace
}  // namespace liquidgemm::cpu
