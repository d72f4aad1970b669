// What every CUDA op needs: the device, the stream, and errors in words.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.hpp"
#include "liquidgemm/device.hpp"
#include "liquidgemm/plan/problem.hpp"

namespace liquidgemm::binding {

using torch::stable::accelerator::DeviceGuard;

// In words where there is something to do about it, else in CUDA's.
std::string explain(cudaError_t error);

inline void check_cuda(cudaError_t error, char const* what) {
  if (error != cudaSuccess)
    fail(what, ": ", explain(error));
}

// Call with the device current.
DeviceInfo hopper_device(char const* op);

inline cudaStream_t current_stream(Tensor const& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline bool aligned_to_16(Tensor const& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// num_sms > 0 overrides the device's SM count.
inline Problem checked_problem(char const* op,
                               int64_t m,
                               int64_t n,
                               int64_t k,
                               FormatId format,
                               DeviceInfo const& device,
                               int num_sms = 0) {
  check(m <= INT32_MAX && n <= INT32_MAX, op, ": expected M and N below 2^31, got M = ", m,
        ", N = ", n);
  return {m, n, k, num_sms > 0 ? num_sms : device.num_sms, device.memory_bytes_per_us, format};
}

}  // namespace liquidgemm::binding
