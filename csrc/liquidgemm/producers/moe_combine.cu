// A token's rows, weighted and added in the order of its slots: no atomics, so that the sum is the
// same whatever the batch. A thread has a vector of one token.
#include "liquidgemm/common/expert.hpp"
#include "liquidgemm/common/formula.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/moe.hpp"
#include "liquidgemm/producers/rows.hpp"

namespace liquidgemm {
namespace {

constexpr int kThreads = 128;

__device__ void round_to(float& to, float value) {
  to = value;
}
__device__ void round_to(__half& to, float value) {
  to = __float2half_rn(value);
}
__device__ void round_to(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}

constexpr int kMostHeld = 8;  // rows of a token that are known before they are there

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const MoeCombineArguments a, const bool aligned) {
  launch_dependent_grids();
  if (!a.rows_are_visible)
    wait_on_dependent_grids();
  const int64_t token = blockIdx.x;
  const int64_t at = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (at >= a.n)
    return;
  const int64_t first = token * a.top_k;
  const auto row_of = [&](int j) {
    if (!a.row_of_slot)
      return expert_of(a.ids, first + j) < 0 ? -1 : static_cast<int32_t>(first + j);
    return __ldcg(a.row_of_slot + first + j);  // not from L1, which may hold what was there before
  };
  int32_t held[kMostHeld];
#pragma unroll
  for (int j = 0; j < kMostHeld; ++j)
    held[j] = j < a.top_k ? row_of(j) : -1;
  wait_on_dependent_grids();
  T const* const y = static_cast<T const*>(a.y);
  float sum[kVector] = {};
  if (a.residual) {
    Vector<T> residual;
    residual.load(static_cast<T const*>(a.residual) + token * a.n + at, a.n - at, aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum[i] = to_float(residual.values[i]);
  }
  const auto exists = [&](int64_t row) { return row >= 0 && row < a.rows; };
  const auto weight_of = [&](int j) { return load_as_float(a.weights, a.weights_type, first + j); };
  const auto add = [&](float weight, Vector<T> const& vector) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, to_float(vector.values[i])));
  };
  int added = 0;
  if (aligned) {
    // All of these rows are requested before the first is added.
    Vector<T> vectors[kMostHeld];
    float weights[kMostHeld];
#pragma unroll
    for (int j = 0; j < kMostHeld; ++j) {
      if (exists(held[j])) {
        vectors[j].load(y + held[j] * a.n + at, kVector, true);
        weights[j] = weight_of(j);
      }
    }
#pragma unroll
    for (int j = 0; j < kMostHeld; ++j) {
      if (exists(held[j]))
        add(weights[j], vectors[j]);
    }
    added = kMostHeld;
  }
#pragma unroll 1
  for (int j = added; j < a.top_k; ++j) {
    if (const int64_t row = row_of(j); exists(row)) {
      Vector<T> vector;
      vector.load(y + row * a.n + at, a.n - at, aligned);
      add(weight_of(j), vector);
    }
  }
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    round_to(out.values[i], sum[i]);
  T* const to = static_cast<T*>(a.out) + token * a.n + at;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(out) / sizeof(uint4)); ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(out.values)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (at + i < a.n)
        to[i] = out.values[i];
    }
  }
}

template <class T>
cudaError_t launch(MoeCombineArguments const& a, cudaStream_t stream) {
  bool aligned = a.n % kVector == 0;
  for (void const* rows : {a.y, a.residual, static_cast<void const*>(a.out)})
    aligned = aligned && has_aligned_rows(rows, 0, 16);  // null is aligned
  const dim3 grid(static_cast<unsigned>(a.tokens),
                  static_cast<unsigned>(ceil_div(a.n, kThreads * kVector)));
  return launch_early(combine_kernel<T>, {grid, kThreads}, stream, a, aligned);
}

}  // namespace

cudaError_t moe_combine(MoeCombineArguments const& a, cudaStream_t stream) {
  if (a.tokens == 0)
    return cudaSuccess;
  return launch_for(a.type, [&](auto of_type) { return launch<decltype(of_type)>(a, stream); });
}

}  // namespace liquidgemm
