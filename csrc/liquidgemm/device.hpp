// The current GPU, as far as the choice of plans asks.
#pragma once

#include <cuda_runtime_api.h>

namespace liquidgemm {

struct DeviceInfo {
  int num_sms;
  int compute_capability;      // 10 * major + minor; the kernels are compiled for 90
  double memory_bytes_per_us;  // peak, from clock and bus width
};

// Of the current device, which is asked once. Returns CUDA's error where there is none.
cudaError_t query_device(DeviceInfo& info);

}  // namespace liquidgemm
