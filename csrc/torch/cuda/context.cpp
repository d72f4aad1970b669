#include "context.hpp"

namespace liquidgemm::binding {
namespace {

std::string version_name(int cuda_version) {
  return message(cuda_version / 1000, ".", cuda_version % 1000 / 10);
}

}  // namespace

std::string explain(cudaError_t error) {
  const std::string built_with =
      message("liquidgemm was built with CUDA ", version_name(CUDART_VERSION));
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int supported = 0;
      cudaDriverGetVersion(&supported);
      return message(built_with, ", but the NVIDIA driver supports CUDA ", version_name(supported),
                     " at most: it needs a newer driver");
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return message(built_with,
                     " for GPUs of compute capability 9.0 (Hopper) and holds no code "
                     "that this GPU or its driver can run");
    default:
      return message(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  }
}

DeviceInfo hopper_device(char const* op) {
  DeviceInfo info{};
  check_cuda(query_device(info), op);
  check(info.compute_capability == 90, op, ": needs a GPU of compute capability 9.0 (Hopper), got ",
        info.compute_capability / 10, ".", info.compute_capability % 10);
  return info;
}

}  // namespace liquidgemm::binding
