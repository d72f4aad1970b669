// Argument checks of the torch bindings: every message names the argument, what was expected and
// what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace liquidgemm::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(Parts const&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A plain runtime_error (RuntimeError in Python): no source path of the build machine in front of
// the message.
template <class... Parts>
void check(bool condition, Parts const&... parts) {
  if (!condition)
    throw std::runtime_error(message(parts...));
}

inline std::string shape_of(Tensor const& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i)
    out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

inline std::string device_of(Tensor const& tensor) {
  return tensor.is_cuda()  ? message("cuda:", tensor.get_device_index())
         : tensor.is_cpu() ? "cpu"
                           : "another device";
}

inline void check_dtype(char const* name,
                        Tensor const& tensor,
                        std::initializer_list<ScalarType> allowed) {
  std::ostringstream names;
  char const* separator = "";
  for (ScalarType dtype : allowed) {
    if (tensor.scalar_type() == dtype)
      return;
    names << separator << torch::headeronly::toString(dtype);
    separator = " or ";
  }
  check(false, name, ": expected dtype ", names.str(), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_dim(char const* name, Tensor const& tensor, int64_t dim) {
  check(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got shape ", shape_of(tensor));
}

inline void check_shape(char const* name,
                        Tensor const& tensor,
                        std::vector<int64_t> const& expected) {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i)
    equal = tensor.size(i) == expected[i];
  if (equal)
    return;
  std::ostringstream shape;
  for (size_t i = 0; i < expected.size(); ++i)
    shape << (i ? ", " : "") << expected[i];
  check(false, name, ": expected shape [", shape.str(), "], got ", shape_of(tensor));
}

inline void check_same_device(char const* name,
                              Tensor const& tensor,
                              char const* reference_name,
                              Tensor const& reference) {
  check(device_of(tensor) == device_of(reference), name, ": expected on ", device_of(reference),
        " like ", reference_name, ", got on ", device_of(tensor));
}

}  // namespace liquidgemm::binding
