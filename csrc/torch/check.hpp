// Argument checks of the torch bindings: every message names the argument, what was expected and
// what came, in the words of the checks in liquidgemm/ops/_checks.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <ostream>
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
[[noreturn]] void fail(Parts const&... parts) {
  throw std::runtime_error(message(parts...));
}

// Its parts are evaluated whether it holds or not, so they are values or views that become text
// only when they are printed.
template <class... Parts>
void check(bool condition, Parts const&... parts) {
  if (!condition)
    fail(parts...);
}

struct ShapeOf {
  Tensor const& tensor;
  friend std::ostream& operator<<(std::ostream& out, ShapeOf const& shape) {
    out << '[';
    for (int64_t i = 0; i < shape.tensor.dim(); ++i)
      out << (i ? ", " : "") << shape.tensor.size(i);
    return out << ']';
  }
};
inline ShapeOf shape_of(Tensor const& tensor) {
  return {tensor};
}

struct DeviceOf {
  Tensor const& tensor;
  friend std::ostream& operator<<(std::ostream& out, DeviceOf const& device) {
    if (device.tensor.is_cuda())
      return out << "cuda:" << device.tensor.get_device_index();
    return out << (device.tensor.is_cpu() ? "cpu" : "another device");
  }
  friend bool operator==(DeviceOf const& a, DeviceOf const& b) {
    return a.tensor.is_cuda() == b.tensor.is_cuda() && a.tensor.is_cpu() == b.tensor.is_cpu() &&
           (!a.tensor.is_cuda() || a.tensor.get_device_index() == b.tensor.get_device_index());
  }
};
inline DeviceOf device_of(Tensor const& tensor) {
  return {tensor};
}

// The name that Python users know: int8, not Char.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:  // the others differ in case alone: BFloat16, UInt16, Bool, Float8_e4m3fn
      std::string name = torch::headeronly::toString(dtype);
      for (char& letter : name)
        letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
      return name;
  }
}

inline void check_dtype(char const* name,
                        ScalarType dtype,
                        std::initializer_list<ScalarType> allowed,
                        char const* what = "dtype ") {
  if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end())
    return;
  std::string names;
  for (ScalarType candidate : allowed)
    names += (names.empty() ? "" : " or ") + dtype_name(candidate);
  fail(name, ": expected ", what, names, ", got ", dtype_name(dtype));
}

inline void check_dtype(char const* name,
                        Tensor const& tensor,
                        std::initializer_list<ScalarType> allowed) {
  check_dtype(name, tensor.scalar_type(), allowed);
}

// `why`, in parts, follows the expected shape in the message.
template <class... Why>
void check_shape(char const* name,
                 Tensor const& tensor,
                 std::vector<int64_t> const& expected,
                 Why const&... why) {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i)
    equal = tensor.size(i) == expected[i];
  if (equal)
    return;
  std::ostringstream shape;
  for (size_t i = 0; i < expected.size(); ++i)
    shape << (i ? ", " : "") << expected[i];
  fail(name, ": expected shape [", shape.str(), "]", why..., ", got ", shape_of(tensor));
}

inline void check_same_device(char const* name,
                              Tensor const& tensor,
                              char const* reference_name,
                              Tensor const& reference) {
  check(device_of(tensor) == device_of(reference), name, ": expected on ", device_of(reference),
        " like ", reference_name, ", got on ", device_of(tensor));
}

}  // namespace liquidgemm::binding
