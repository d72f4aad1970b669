// Memory for the kernels of one call.
#pragma once

#include <cstdlib>
#include <optional>

#include "../tensors.hpp"

namespace liquidgemm::binding {

// From torch's allocator, for the current device and stream. A tensor costs the host about a
// microsecond more.
class Workspace {
 public:
  // `like` is a tensor of the current device.
  Workspace(Tensor const& like, int64_t bytes) {
    if (bytes == 0)
      return;
    if (is_cached()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &data_));
    } else {
      tensor_ = allocate(like, {bytes}, ScalarType::Byte);
      data_ = tensor_->mutable_data_ptr();
    }
  }
  ~Workspace() {
    if (data_ && !tensor_)
      aoti_torch_cuda_caching_allocator_raw_delete(data_);
  }
  Workspace(Workspace const&) = delete;
  Workspace& operator=(Workspace const&) = delete;

  void* data() const { return data_; }

 private:
  // Without torch's cache each allocation is one of CUDA's own, so that compute-sanitizer sees
  // where it ends. torch heeds its switch for tensors alone.
  static bool is_cached() {
    static const bool cached = std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING") == nullptr;
    return cached;
  }

  void* data_ = nullptr;
  std::optional<Tensor> tensor_;
};

}  // namespace liquidgemm::binding
