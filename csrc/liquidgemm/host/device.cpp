#include "liquidgemm/device.hpp"

#include <mutex>

namespace liquidgemm {
namespace {

cudaError_t query(int device, DeviceInfo& info) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.num_sms, cudaDevAttrMultiProcessorCount, device);
  int kilohertz = 0, bits = 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device);
  info.compute_capability = 10 * major + minor;
  info.memory_bytes_per_us = 2e-3 * kilohertz * bits / 8;  // two transfers per clock
  return error;
}

}  // namespace

cudaError_t query_device(DeviceInfo& info) {
  constexpr int kMaxDevices = 64;
  static std::once_flag once[kMaxDevices];
  static DeviceInfo cached[kMaxDevices];
  static cudaError_t errors[kMaxDevices];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return error;
  if (device >= kMaxDevices)
    return query(device, info);
  std::call_once(once[device], [&] { errors[device] = query(device, cached[device]); });
  info = cached[device];
  return errors[device];
}

}  // namespace liquidgemm
