// Tensors of torch's stable ABI: allocation and shapes. What an eager call does several times goes
// past the dispatcher, which takes microseconds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "check.hpp"

namespace liquidgemm::binding {

inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    default:
      fail("no tensor of dtype ", dtype_name(dtype), " is allocated here");
  }
}

// Contiguous and uninitialized, on the device of `like`.
inline Tensor allocate(Tensor const& like, std::vector<int64_t> const& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), shim_dtype(dtype), device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor dense(Tensor const& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> leading_sizes(Tensor const& x) {
  std::vector<int64_t> sizes;
  sizes.reserve(x.dim() + 1);  // with_last appends one
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    sizes.push_back(x.size(i));
  return sizes;
}

inline std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

inline int64_t rows_of(Tensor const& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    rows *= x.size(i);
  return rows;
}

}  // namespace liquidgemm::binding
