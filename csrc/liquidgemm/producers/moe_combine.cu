// A token's rows, weighted and added in the order of its slots: no atomics, so that the sum is the
// same whatever the batch. A thread has a vector of one token.
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

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const MoeCombineArguments a, const bool aligned) {
  launch_dependent_grids();
  wait_on_dependent_grids();
  const int64_t token = blockIdx.x;
  const int64_t at = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (at >= a.n)
    return;
  T const* const y = static_cast<T const*>(a.y);
  float sum[kVector] = {};
  if (a.residual) {
    Vector<T> residual;
    residual.load(static_cast<T const*>(a.residual) + token * a.n + at, a.n - at, aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum[i] = to_float(residual.values[i]);
  }
#pragma unroll 4
  for (int j = 0; j < a.top_k; ++j) {
    const int64_t slot = token * a.top_k + j;
    const int64_t row = a.row_of_slot[slot];
    if (row < 0 || row >= a.rows)
      continue;
    Vector<T> vector;
    vector.load(y + row * a.n + at, a.n - at, aligned);
    const float weight = load_as_float(a.weights, a.weights_type, slot);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, to_float(vector.values[i])));
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
