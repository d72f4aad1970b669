// Argument checks of the torch bindings: every message names the argument, what was expected and
// what came, in the words of the checks in liquidgemm/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cctype>
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
[[noreturn]] void fail(Parts const&... parts) {
  throw std::runtime_error(message(parts...));
}

// Its parts are evaluated whether it holds or not: where they take long, ask first, then `fail`.
template <class... Parts>
void check(bool condition, Parts const&... parts) {
  if (!condition)
    fail(parts...);
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
  std::ostringstream names;
  char const* separator = "";
  for (ScalarType candidate : allowed) {
    if (dtype == candidate)
      return;
    names << separator << dtype_name(candidate);
    separator = " or ";
  }
  check(false, name, ": expected ", what, names.str(), ", got ", dtype_name(dtype));
}

inline void check_dtype(char const* name,
                        Tensor const& tensor,
                        std::initializer_list<ScalarType> allowed) {
  check_dtype(name, tensor.scalar_type(), allowed);
}

// `why` follows the expected shape in the message.
inline void check_shape(char const* name,
                        Tensor const& tensor,
                        std::vector<int64_t> const& expected,
                        std::string const& why = "") {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i)
    equal = tensor.size(i) == expected[i];
  if (equal)
    return;
  std::ostringstream shape;
  for (size_t i = 0; i < expected.size(); ++i)
    shape << (i ? ", " : "") << expected[i];
  check(false, name, ": expected shape [", shape.str(), "]", why, ", got ", shape_of(tensor));
}

inline void check_same_device(char const* name,
                              Tensor const& tensor,
                              char const* reference_name,
                              Tensor const& reference) {
  check(device_of(tensor) == device_of(reference), name, ": expected on ", device_of(reference),
        " like ", reference_name, ", got on ", device_of(tensor));
}

}  // namespace liquidgemm::binding
