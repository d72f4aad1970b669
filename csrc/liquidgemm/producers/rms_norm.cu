// RMSNorm and quantization: one CTA per token. The order of the sum is that of common/norm.hpp, the
// quantizer's formula that of producers/quantizer.hpp.
//
// A thread keeps its part of the row in registers: first h, then y. A row that is longer than what
// its CTA holds is read three times there.
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/common/int8.hpp"
#include "liquidgemm/norm.hpp"
#include "liquidgemm/producers/pairs.hpp"
#include "liquidgemm/producers/rows.hpp"

namespace liquidgemm {
namespace {

static_assert(kSumVector == kVector && kSumLanes == 32 && kSumChains == 32);

constexpr int64_t kMaxGroups = ceil_div(kMaxK, kSumLanes* kSumVector);

// Threads that have the registers for so many vectors.
template <class T>
constexpr int max_threads(int held) {
  return held * sizeof(T) >= 8 ? kMaxQuantizerThreads / 2 : kMaxQuantizerThreads;
}

template <class T, class W>
struct NormRows {
  T const *x, *residual;
  W const* weight;
  T *h, *y;
  int8_t* out;
  float* scale;
  int64_t k;
  float eps, offset;
  NormMode mode;
  bool aligned;         // x, residual, h, y and out: whole vectors
  bool weight_aligned;  // as well
  bool weight_is_old;
  bool streamed;  // x
};

// Adds the upper half of a warp's values to the lower one until one is left, for all lanes.
CUTE_DEVICE float sum_of_lanes(float value) {
  CUTE_UNROLL
  for (int half = 16; half > 0; half /= 2)
    value = rounded::add(value, __shfl_xor_sync(0xffffffffu, value, half));
  return value;
}

template <class T>
CUTE_DEVICE float sum_of_squares(Vector<T> const& vector) {
  float2 sums[kPairs];
  CUTE_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const float2 v = Pair<T>::to_floats(pairs(vector)[i]);
    sums[i] = Pair<float>::multiply(v, v);
  }
  CUTE_UNROLL
  for (int half = kPairs / 2; half > 0; half /= 2) {
    CUTE_UNROLL
    for (int i = 0; i < half; ++i)
      sums[i] = Pair<float>::add(sums[i], sums[i + half]);
  }
  return rounded::add(sums[0].x, sums[0].y);
}

template <class T, class W>
class NormRow {
 public:
  CUTE_DEVICE NormRow(NormRows<T, W> const& rows, int64_t token)
      : rows_(rows), offset_(token * rows.k) {}

  CUTE_DEVICE void load_weight(Vector<W>& vector, int64_t at) const {
    vector.load(rows_.weight + at, rows_.k - at, rows_.weight_aligned);
  }

  // h, which is stored if there is a residual.
  CUTE_DEVICE void load(Vector<T>& vector, int64_t at) const {
    vector.load(rows_.x + offset_ + at, rows_.k - at, rows_.aligned, rows_.streamed);
    if (rows_.residual == nullptr)
      return;
    Vector<T> residual;
    residual.load(rows_.residual + offset_ + at, rows_.k - at, rows_.aligned);
    CUTE_UNROLL
    for (int i = 0; i < kPairs; ++i)
      pairs(vector)[i] = Pair<T>::add(pairs(vector)[i], pairs(residual)[i]);
    store(rows_.h + offset_ + at, vector, rows_.k - at, rows_.aligned);
  }

  // h becomes y, which is stored if it is wanted.
  CUTE_DEVICE void norm(Vector<T>& vector,
                        Vector<W> const& weight,
                        float factor,
                        int64_t at) const {
    CUTE_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const float2 h = Pair<T>::to_floats(pairs(vector)[i]);
      pairs(vector)[i] =
          norm(Pair<float>::multiply(h, make_float2(factor, factor)), pairs(weight)[i]);
    }
    if (rows_.y != nullptr)
      store(rows_.y + offset_ + at, vector, rows_.k - at, rows_.aligned);
  }

  // What load() and norm() left, of a part of the row that is not held.
  CUTE_DEVICE void load_again(Vector<T>& vector, float factor, int64_t at) const {
    T const* const h = rows_.residual == nullptr ? rows_.x : rows_.h;
    vector.load(h + offset_ + at, rows_.k - at, rows_.aligned);
    Vector<W> weight;
    load_weight(weight, at);
    norm(vector, weight, factor, at);
  }

  CUTE_DEVICE void store_quantized(uint2 bytes, int64_t at) const {
    store(rows_.out + offset_ + at, bytes, rows_.k - at, rows_.aligned);
  }

 private:
  // Of h / root, in float32.
  CUTE_DEVICE typename Pair<T>::Type norm(float2 scaled, typename Pair<W>::Type weight) const {
    if (rows_.mode == NormMode::kLlama) {
      const typename Pair<T>::Type once = Pair<T>::round(scaled);
      if constexpr (std::is_same_v<T, W>) {
        return Pair<T>::multiply(once, weight);
      } else {
        return Pair<T>::round(Pair<float>::multiply(Pair<T>::to_floats(once), weight));
      }
    }
    const float2 offset = make_float2(rows_.offset, rows_.offset);
    const float2 factor = Pair<float>::add(offset, Pair<W>::to_floats(weight));
    return Pair<T>::round(Pair<float>::multiply(scaled, factor));
  }

  NormRows<T, W> const& rows_;
  int64_t offset_;
};

// 1 / sqrt(mean + eps), from the sums of the row's groups.
CUTE_DEVICE float norm_factor(float const* sum_of_group, int64_t k, float eps) {
  const int groups = static_cast<int>(ceil_div(k, kSumLanes * kSumVector));
  float chain = 0;
  for (int group = threadIdx.x % 32; group < groups; group += kSumChains)
    chain = rounded::add(chain, sum_of_group[group]);
  const float mean = rounded::divide(sum_of_lanes(chain), static_cast<float>(k));
  return rounded::divide(1.f, rounded::square_root(rounded::add(mean, eps)));
}

template <class T, class W, int kHeld>
__global__ void __launch_bounds__(max_threads<T>(kHeld))
    rms_norm_kernel(const __grid_constant__ NormRows<T, W> rows) {
  // The next kernel, a GEMM, may start to fetch its weights. It waits for this one before it
  // touches anything else, and this one, but for the norm's own weight, for the kernel before it.
  launch_dependent_grids();
  __shared__ float sum_of_group[kMaxGroups];
  const ClusterMax cluster_max;
  const NormRow<T, W> row(rows, blockIdx.x);
  // The weight of a large model comes from memory: it is asked for before there is an x.
  constexpr bool kHoldsWeight = kHeld <= 2;
  Vector<W> weights[kHoldsWeight ? kHeld : 1];
  const auto load_weights = [&] {
    if constexpr (kHoldsWeight) {
      CUTE_UNROLL
      for (int i = 0; i < kHeld; ++i)
        row.load_weight(weights[i], first_element() + i * step());
    }
  };
  if (rows.weight_is_old)
    load_weights();
  wait_on_dependent_grids();
  if (!rows.weight_is_old)
    load_weights();

  Vector<T> held[kHeld];
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    row.load(held[i], first_element() + i * step());
  const auto add_group = [&](Vector<T> const& vector, int64_t at) {
    const float sum = sum_of_lanes(sum_of_squares(vector));
    if (threadIdx.x % 32 == 0 && at < rows.k)
      sum_of_group[at / (kSumLanes * kSumVector)] = sum;
  };
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    add_group(held[i], first_element() + i * step());
#pragma unroll 1
  for (int64_t warp = first_element() - threadIdx.x % 32 * kVector + kHeld * step(); warp < rows.k;
       warp += step()) {
    const int64_t at = warp + threadIdx.x % 32 * kVector;
    Vector<T> vector;
    row.load(vector, at);
    add_group(vector, at);
  }
  __syncthreads();
  const float factor = norm_factor(sum_of_group, rows.k, rows.eps);

  Largest<T> of_thread;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = first_element() + i * step();
    if constexpr (!kHoldsWeight)
      row.load_weight(weights[0], at);
    row.norm(held[i], weights[kHoldsWeight ? i : 0], factor, at);
    of_thread.add(held[i]);
  }
#pragma unroll 1
  for (int64_t at = first_element() + kHeld * step(); at < rows.k; at += step()) {
    Vector<T> vector;
    row.load_again(vector, factor, at);
    of_thread.add(vector);
  }
  const float scale = activation_scale(cluster_max(of_thread.float_bits()));
  if (threadIdx.x == 0)
    rows.scale[blockIdx.x] = scale;
  quantize_row(
      scale, held, rows.k,
      [&](Vector<T>& vector, int64_t at) { row.load_again(vector, factor, at); },
      [&](uint2 bytes, int64_t at) { row.store_quantized(bytes, at); });
}

template <class T, class W>
auto kernel_holding(int held) {
  switch (held) {
    case 1:
      return rms_norm_kernel<T, W, 1>;
    case 2:
      return rms_norm_kernel<T, W, 2>;
    case 4:
      return rms_norm_kernel<T, W, 4>;
    default:
      return rms_norm_kernel<T, W, kMaxHeld>;
  }
}

template <class T, class W>
cudaError_t launch(RmsNormArguments const& a, cudaStream_t stream) {
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(T));
  bool aligned = has_aligned_rows(a.out, a.k, kVector);
  for (void const* rows :
       {a.x, a.residual, static_cast<void const*>(a.h), static_cast<void const*>(a.y)})
    aligned = aligned && has_aligned_rows(rows, row_bytes, 16);  // null is aligned
  const NormRows<T, W> rows{.x = static_cast<T const*>(a.x),
                            .residual = static_cast<T const*>(a.residual),
                            .weight = static_cast<W const*>(a.weight),
                            .h = static_cast<T*>(a.h),
                            .y = static_cast<T*>(a.y),
                            .out = a.out,
                            .scale = a.scale,
                            .k = a.k,
                            .eps = a.eps,
                            .offset = a.offset,
                            .mode = a.mode,
                            .aligned = aligned,
                            .weight_aligned = has_aligned_rows(a.weight, 0, 16),
                            .weight_is_old = a.weight_is_old,
                            .streamed = is_streamed(a.m * row_bytes)};
  const RowDivision division = divide_rows(a.m, a.k, {false, kNoClusters}, max_threads<T>);
  return launch_rows(kernel_holding<T, W>(division.held), division, a.m, stream, rows);
}

template <class T>
cudaError_t launch(RmsNormArguments const& a, cudaStream_t stream) {
  if (a.weight_type == a.x_type)
    return launch<T, T>(a, stream);
  return a.weight_type == Element::kFloat32 ? launch<T, float>(a, stream) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t rms_norm_quantize(RmsNormArguments const& a, cudaStream_t stream) {
  if (a.m == 0)
    return cudaSuccess;
  return launch_for(a.x_type, [&](auto of_type) { return launch<decltype(of_type)>(a, stream); });
}

}  // namespace liquidgemm
