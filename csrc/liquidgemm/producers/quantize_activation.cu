// Activation quantization: one CTA per token, or for few long ones a cluster of them. The formula
// is that of producers/quantizer.hpp.
//
// A thread keeps its part of the row in registers between the maximum and the division. For few
// tokens this kernel is latency and nothing else, much of it that of fetching instructions: each
// thread has one vector then, and the code is short. For many it runs at the speed of memory.
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/producers/rows.hpp"
#include "liquidgemm/quantize.hpp"

namespace liquidgemm {
namespace {

// Threads that have the registers for so many vectors.
constexpr int max_threads(int held) {
  return held == kMaxHeld ? kMaxQuantizerThreads / 2 : kMaxQuantizerThreads;
}

template <class T>
struct Row {
  T const* x;
  int8_t* out;
  int64_t k;
  bool aligned;   // x and out: whole vectors
  bool streamed;  // x

  __device__ void load(Vector<T>& vector, int64_t at) const {
    vector.load(x + at, k - at, aligned, streamed);
  }

  template <bool kCommon, int kHeld>
  __device__ void quantize(Quantizer const& quantizer, Vector<T> const (&held)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first_element() + i * step();
      store(out + at, quantizer.quantize<kCommon>(held[i]), k - at, aligned);
    }
#pragma unroll 1
    for (int64_t at = first_element() + kHeld * step(); at < k; at += step()) {
      Vector<T> vector;
      load(vector, at);
      store(out + at, quantizer.quantize<kCommon>(vector), k - at, aligned);
    }
  }
};

// `kHeld` vectors of each thread stay in registers; what a longer row has beyond them is read
// twice.
template <class T, int kHeld>
__global__ void __launch_bounds__(max_threads(kHeld)) quantize_kernel(T const* x,
                                                                      int8_t* out,
                                                                      float* scales,
                                                                      int64_t k,
                                                                      int64_t out_stride,
                                                                      bool aligned,
                                                                      bool streamed) {
  // The next kernel, a GEMM, may start to fetch its weights. It waits for this one before it
  // touches anything else, and this one for the kernel before it.
  launch_dependent_grids();
  const ClusterMax cluster_max;
  wait_on_dependent_grids();

  const int64_t token = cute::cluster_id_in_grid().x;
  const Row<T> row{x + token * k, out + token * out_stride, k, aligned, streamed};
  Vector<T> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    row.load(held[i], first_element() + i * step());
  Largest<T> of_thread;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    of_thread.add(held[i]);
#pragma unroll 1
  for (int64_t at = first_element() + kHeld * step(); at < k; at += step()) {
    Vector<T> vector;
    row.load(vector, at);
    of_thread.add(vector);
  }
  const float scale = activation_scale(cluster_max(of_thread.float_bits()));
  if (first_element() == 0)
    scales[token] = scale;
  const Quantizer quantizer(scale);
  if (Quantizer::is_common(scale)) {
    row.template quantize<true>(quantizer, held);
  } else {
    row.template quantize<false>(quantizer, held);
  }
}

template <class T>
auto kernel_holding(int held) {
  switch (held) {
    case 1:
      return quantize_kernel<T, 1>;
    case 2:
      return quantize_kernel<T, 2>;
    case 4:
      return quantize_kernel<T, 4>;
    default:
      return quantize_kernel<T, kMaxHeld>;
  }
}

template <class T>
cudaError_t launch(QuantizeArguments const& a, cudaStream_t stream) {
  const RowDivision division = divide_rows(a.m, a.k, {true, kNoClusters}, max_threads);
  const bool aligned =
      has_aligned_rows(a.x, a.k * sizeof(T), 16) && has_aligned_rows(a.out, a.out_stride, kVector);
  return launch_rows(kernel_holding<T>(division.held), division, a.m, stream,
                     static_cast<T const*>(a.x), a.out, a.scale, a.k, a.out_stride, aligned,
                     is_streamed(a.m * a.k * static_cast<int64_t>(sizeof(T))));
}

}  // namespace

cudaError_t quantize_activation(QuantizeArguments const& a, cudaStream_t stream) {
  if (a.m == 0)
    return cudaSuccess;
  return launch_for(a.x_type, [&](auto of_type) { return launch<decltype(of_type)>(a, stream); });
}

}  // namespace liquidgemm
