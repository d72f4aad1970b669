// The C++ API: plain pointers, plain sizes, a stream. Nothing here knows torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/formats/pack.hpp"
#include "liquidgemm/plan/plan.hpp"

namespace liquidgemm {

struct GemmArguments {
  void const* x;              // [m, k], 16-byte aligned
  Element x_type;             // kInt8; kBFloat16 or kFloat16 where fits_quantized() says so
  int64_t x_stride;           // bytes between rows, a multiple of 16; k elements where not int8
  float const* x_scale;       // [m], where x is int8
  bool x_is_new;              // written by the kernel before, a quantizer
  uint8_t const* weight;      // packed [ceil(n / 64), ceil(k / 64), kBlockBytes], 16-byte aligned
  float const* weight_scale;  // [n]
  void const* bias;           // [n] or null
  Element bias_type;
  void* y;           // [m, n], aligned to four elements if y_stride is a multiple of four
  int64_t y_stride;  // elements between rows
  Element y_type;    // kInt32: the raw sums
  int64_t m, n, k;
};

struct DeviceInfo {
  int num_sms;
  int compute_capability;      // 90 is what the kernels are compiled for
  double memory_bytes_per_us;  // peak, from clock and bus width
};
// Of the current device; asked once per device.
cudaError_t query_device(DeviceInfo& info);

// Enqueues y = x W^T with the given plan on at most num_sms SMs. Never synchronizes, never
// allocates.
cudaError_t gemm(GemmArguments const& arguments,
                 Plan const& plan,
                 int num_sms,
                 cudaStream_t stream);

struct QuantizeArguments {
  void const* x;   // [m, k] contiguous
  Element x_type;  // kBFloat16, kFloat16 or kFloat32
  int8_t* out;     // [m, k], rows out_stride bytes apart
  int64_t out_stride;
  float* scale;  // [m]
  int64_t m, k;
};
cudaError_t quantize_activation(QuantizeArguments const& arguments, cudaStream_t stream);

// Panel-parallel versions of formats/pack.hpp. *infeasible (device memory, zeroed by the caller)
// becomes 1 if a code overflows.
cudaError_t pack_weight(LogicalWeight const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream);
cudaError_t unpack_weight(uint8_t const* packed, LogicalWeight const& logical, cudaStream_t stream);

}  // namespace liquidgemm
