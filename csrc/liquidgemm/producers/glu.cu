// The activation of a gated MLP and quantization: one CTA per token, or for long ones a cluster
// of them. The functions are those of common/activation.hpp, the quantizer's formula that of
// producers/quantizer.hpp.
//
// A thread keeps its part of y in registers between the maximum and the division; what a longer row
// has beyond it is computed twice.
#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/glu.hpp"
#include "liquidgemm/producers/pairs.hpp"
#include "liquidgemm/producers/rows.hpp"

namespace liquidgemm {
namespace {

// Threads that have the registers for so many vectors.
template <class T>
constexpr int max_threads(int held) {
  return held * sizeof(T) >= 16 ? kMaxQuantizerThreads / 2 : kMaxQuantizerThreads;
}

template <class T>
struct GluRows {
  T const* gate_up;
  T* y;
  int8_t* out;
  float* scale;
  int64_t k;
  bool aligned;   // all of them: whole vectors
  bool streamed;  // gate_up
};

template <GatedActivation kActivation>
CUTE_DEVICE float2 of_gates(float2 gates) {
  if constexpr (kActivation == GatedActivation::kSiluMul) {
    return make_float2(silu(gates.x), silu(gates.y));
  } else if constexpr (kActivation == GatedActivation::kGeluTanhMul) {
    return make_float2(gelu_tanh(gates.x), gelu_tanh(gates.y));
  } else {
    return make_float2(swiglu_gate(gates.x), swiglu_gate(gates.y));
  }
}

template <class T, GatedActivation kActivation>
class GluRow {
 public:
  CUTE_DEVICE GluRow(GluRows<T> const& rows, int64_t token) : rows_(rows), token_(token) {}

  CUTE_DEVICE void load(Vector<T>& gate, Vector<T>& up, int64_t at) const {
    T const* const row = rows_.gate_up + token_ * 2 * rows_.k + at;
    gate.load(row, rows_.k - at, rows_.aligned, rows_.streamed);
    up.load(row + rows_.k, rows_.k - at, rows_.aligned, rows_.streamed);
  }

  // The gates become y, which is stored if it is wanted.
  CUTE_DEVICE void activate(Vector<T>& gate, Vector<T> const& up, int64_t at) const {
    CUTE_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const float2 activated = of_gates<kActivation>(Pair<T>::to_floats(pairs(gate)[i]));
      typename Pair<T>::Type factors = pairs(up)[i];
      if constexpr (kActivation == GatedActivation::kSwigluClamped) {
        const float2 ups = Pair<T>::to_floats(factors);
        factors = Pair<T>::round(make_float2(swiglu_up(ups.x), swiglu_up(ups.y)));
      }
      pairs(gate)[i] = Pair<T>::multiply(Pair<T>::round(activated), factors);
    }
    if (rows_.y != nullptr)
      store(rows_.y + token_ * rows_.k + at, gate, rows_.k - at, rows_.aligned);
  }

  CUTE_DEVICE void compute(Vector<T>& y, int64_t at) const {
    Vector<T> up;
    load(y, up, at);
    activate(y, up, at);
  }

  CUTE_DEVICE void store_quantized(uint2 bytes, int64_t at) const {
    store(rows_.out + token_ * rows_.k + at, bytes, rows_.k - at, rows_.aligned);
  }

 private:
  GluRows<T> const& rows_;
  int64_t token_;
};

template <class T, GatedActivation kActivation, int kHeld>
__global__ void __launch_bounds__(max_threads<T>(kHeld), 1)
    glu_kernel(const __grid_constant__ GluRows<T> rows) {
  // As in quantize_activation.cu.
  launch_dependent_grids();
  const ClusterMax cluster_max;
  wait_on_dependent_grids();

  const int64_t token = cute::cluster_id_in_grid().x;
  const GluRow<T, kActivation> row(rows, token);
  Vector<T> held[kHeld];
  if constexpr (kHeld <= 2) {  // all loads before the first of them is needed
    Vector<T> ups[kHeld];
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      row.load(held[i], ups[i], first_element() + i * step());
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      row.activate(held[i], ups[i], first_element() + i * step());
  } else {
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      row.compute(held[i], first_element() + i * step());
  }
  Largest<T> of_thread;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    of_thread.add(held[i]);
#pragma unroll 1
  for (int64_t at = first_element() + kHeld * step(); at < rows.k; at += step()) {
    Vector<T> y;
    row.compute(y, at);
    of_thread.add(y);
  }
  const float scale = activation_scale(cluster_max(of_thread.float_bits()));
  if (first_element() == 0)
    rows.scale[token] = scale;
  quantize_row(
      scale, held, rows.k, [&](Vector<T>& vector, int64_t at) { row.compute(vector, at); },
      [&](uint2 bytes, int64_t at) { row.store_quantized(bytes, at); });
}

template <class T, GatedActivation kActivation>
auto kernel_holding(int held) {
  switch (held) {
    case 1:
      return glu_kernel<T, kActivation, 1>;
    case 2:
      return glu_kernel<T, kActivation, 2>;
    case 4:
      return glu_kernel<T, kActivation, 4>;
    default:
      return glu_kernel<T, kActivation, kMaxHeld>;
  }
}

template <class T, GatedActivation kActivation>
cudaError_t launch(GluArguments const& a, cudaStream_t stream) {
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(T));
  const bool aligned = has_aligned_rows(a.gate_up, row_bytes, 16) &&
                       has_aligned_rows(a.y, row_bytes, 16) &&  // null is aligned
                       has_aligned_rows(a.out, a.k, kVector);
  const GluRows<T> rows{.gate_up = static_cast<T const*>(a.gate_up),
                        .y = static_cast<T*>(a.y),
                        .out = a.out,
                        .scale = a.scale,
                        .k = a.k,
                        .aligned = aligned,
                        .streamed = is_streamed(2 * a.m * row_bytes)};
  // A thread that holds more waits for each of its loads, and half as many threads fit on an SM.
  constexpr int64_t kMostOfCta = 4 * kMaxQuantizerThreads / 2;
  const RowDivision division = divide_rows(a.m, a.k, {true, kMostOfCta}, max_threads<T>);
  return launch_rows(kernel_holding<T, kActivation>(division.held), division, a.m, stream, rows);
}

template <class T>
cudaError_t launch(GluArguments const& a, cudaStream_t stream) {
  switch (a.activation) {
    case GatedActivation::kSiluMul:
      return launch<T, GatedActivation::kSiluMul>(a, stream);
    case GatedActivation::kGeluTanhMul:
      return launch<T, GatedActivation::kGeluTanhMul>(a, stream);
    case GatedActivation::kSwigluClamped:
      return launch<T, GatedActivation::kSwigluClamped>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t glu_quantize(GluArguments const& a, cudaStream_t stream) {
  if (a.m == 0)
    return cudaSuccess;
  return launch_for(a.type, [&](auto of_type) { return launch<decltype(of_type)>(a, stream); });
}

}  // namespace liquidgemm
