// Activation quantization of rows in another order, or of some rows: one CTA per row of the output,
// or per token that becomes several rows. The formula is that of producers/quantizer.hpp.
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/moe.hpp"
#include "liquidgemm/producers/rows.hpp"

namespace liquidgemm {
namespace {

constexpr int kMostThreads = 512;
constexpr int kMostHeld = 4;  // vectors of a thread that stay in registers

template <class T>
struct Arguments {
  T const* x;
  int32_t const* index;
  int8_t* out;
  float* scale;
  int64_t tokens, rows, k, out_stride;
  int top_k;
  bool aligned;
};

// The token of a row in the order of the output, or -1.
template <RowOrder kOrder, class T>
__device__ int64_t token_of_row(Arguments<T> const& a, int64_t row) {
  const int32_t entry = __ldcg(a.index + row);  // not from L1, which may hold what was there
  const int64_t token = entry < 0 ? -1 : kOrder == RowOrder::kInPlace ? row : entry / a.top_k;
  return token < a.tokens ? token : -1;
}

template <RowOrder kOrder, bool kCommon, class T>
__device__ void write(Arguments<T> const& a,
                      int64_t source,
                      Quantizer const& quantizer,
                      Vector<T> const& vector,
                      int64_t at) {
  const uint2 bytes = quantizer.quantize<kCommon>(vector);
  if constexpr (kOrder == RowOrder::kScatter) {
#pragma unroll 4
    for (int j = 0; j < a.top_k; ++j) {
      const int64_t row = a.index[source * a.top_k + j];
      if (row >= 0 && row < a.rows)
        store(a.out + row * a.out_stride + at, bytes, a.k - at, a.aligned);
    }
  } else {
    store(a.out + source * a.out_stride + at, bytes, a.k - at, a.aligned);
  }
}

// CTAs of the most threads to an SM, at least.
template <RowOrder kOrder, class T>
constexpr int kCtasPerSm = kOrder == RowOrder::kInPlace && sizeof(T) == 2 ? 3 : 2;

template <RowOrder kOrder, class T>
__global__ void __launch_bounds__(kMostThreads, (kCtasPerSm<kOrder, T>))
    quantize_rows_kernel(const Arguments<T> a) {
  // In a layer of experts the first quantizer follows the schedule, and before it the first product
  // reads offsets: it must not start before they are complete. The second quantizer starts itself
  // only after all CTAs of the first product have seen that they are.
  if constexpr (kOrder == RowOrder::kInPlace) {
    launch_dependent_grids();
  } else {
    wait_on_dependent_grids();
    launch_dependent_grids();
  }

  __shared__ uint32_t of_warp[kMostThreads / 32];
  const int64_t source = blockIdx.x;  // a token if rows are scattered, else a row
  const int64_t token = kOrder == RowOrder::kScatter ? source : token_of_row<kOrder>(a, source);
  if constexpr (kOrder == RowOrder::kInPlace)
    wait_on_dependent_grids();
  if (token < 0)
    return;
  T const* const x = a.x + token * a.k;
  const int64_t first = int64_t(threadIdx.x) * kVector, step = int64_t(blockDim.x) * kVector;
  Vector<T> held[kMostHeld];
  Largest<T> of_thread;
#pragma unroll
  for (int i = 0; i < kMostHeld; ++i)
    held[i].load(x + first + i * step, a.k - first - i * step, a.aligned);
#pragma unroll
  for (int i = 0; i < kMostHeld; ++i)
    of_thread.add(held[i]);
#pragma unroll 1
  for (int64_t at = first + kMostHeld * step; at < a.k; at += step) {
    Vector<T> vector;
    vector.load(x + at, a.k - at, a.aligned);
    of_thread.add(vector);
  }
  const float scale = activation_scale(max_of_cta(of_thread.float_bits(), of_warp));
  if constexpr (kOrder == RowOrder::kScatter) {
    for (int j = threadIdx.x; j < a.top_k; j += blockDim.x) {
      const int64_t row = a.index[source * a.top_k + j];
      if (row >= 0 && row < a.rows)
        a.scale[row] = scale;
    }
  } else if (threadIdx.x == 0) {
    a.scale[source] = scale;
  }
  const Quantizer quantizer(scale);
  const auto write_all = [&](auto common) {
    constexpr bool kCommon = decltype(common)::value;
#pragma unroll
    for (int i = 0; i < kMostHeld; ++i) {
      if (first + i * step < a.k)
        write<kOrder, kCommon>(a, source, quantizer, held[i], first + i * step);
    }
#pragma unroll 1
    for (int64_t at = first + kMostHeld * step; at < a.k; at += step) {
      Vector<T> vector;
      vector.load(x + at, a.k - at, a.aligned);
      write<kOrder, kCommon>(a, source, quantizer, vector, at);
    }
  };
  if (Quantizer::is_common(scale)) {
    write_all(std::true_type{});
  } else {
    write_all(std::false_type{});
  }
}

template <class T>
cudaError_t launch(QuantizeRowsArguments const& a, cudaStream_t stream) {
  const int64_t vectors = ceil_div(a.k, kVector);
  // Two vectors per thread where there are several CTAs to an SM; few rows want all threads.
  const int64_t wanted = a.rows >= 512 ? ceil_div(vectors, 2) : vectors;
  const int threads = static_cast<int>(
      std::min<int64_t>(kMostThreads, ceil_div(std::max<int64_t>(wanted, 1), 32) * 32));
  const Arguments<T> arguments{.x = static_cast<T const*>(a.x),
                               .index = a.index,
                               .out = a.out,
                               .scale = a.scale,
                               .tokens = a.tokens,
                               .rows = a.rows,
                               .k = a.k,
                               .out_stride = a.out_stride,
                               .top_k = a.top_k,
                               .aligned = has_aligned_rows(a.x, a.k * sizeof(T), 16) &&
                                          has_aligned_rows(a.out, a.out_stride, kVector)};
  const int64_t ctas = a.order == RowOrder::kScatter ? a.tokens : a.rows;
  auto* const kernel = a.order == RowOrder::kScatter  ? quantize_rows_kernel<RowOrder::kScatter, T>
                       : a.order == RowOrder::kGather ? quantize_rows_kernel<RowOrder::kGather, T>
                                                      : quantize_rows_kernel<RowOrder::kInPlace, T>;
  return launch_early(kernel, {dim3(static_cast<unsigned>(ctas)), threads}, stream, arguments);
}

}  // namespace

cudaError_t quantize_rows(QuantizeRowsArguments const& a, cudaStream_t stream) {
  if (a.rows == 0 || a.tokens == 0)
    return cudaSuccess;
  return launch_for(a.x_type, [&](auto of_type) { return launch<decltype(of_type)>(a, stream); });
}

}  // namespace liquidgemm
