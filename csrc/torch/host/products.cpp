// The CPU side of quantize_activation, gemm and linear: check, allocate, one call. The checks are
// those of the CUDA ops, in the same words.
#include <array>
#include <tuple>

#include "../product.hpp"
#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::binding {
namespace {

void on_torch_threads(int64_t count, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Calls an op of liquidgemm/_reference.py; the results take the places of the first arguments.
template <size_t N>
void call_reference(char const* op, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor float_bias(Tensor const& bias) {
  return bias.scalar_type() == ScalarType::Float ? bias
                                                 : torch::stable::to(bias, ScalarType::Float);
}

// x is int8 with x_scale, or a float type without.
Tensor multiply(cpu::Kernels const& kernels,
                Tensor const& x,
                OptionalTensor const& x_scale,
                Weight const& weight,
                ScalarType out_type) {
  const int64_t k = x.size(-1), n = weight.n();
  Tensor y = torch::stable::new_empty(x, with_last(leading_sizes(x), n), out_type);
  const Tensor rows = torch::stable::contiguous(x);
  OptionalTensor bias, scale;
  if (weight.bias)
    bias = float_bias(*weight.bias);
  if (x_scale)
    scale = torch::stable::contiguous(*x_scale);
  cpu::GemmArguments arguments{};
  arguments.x = rows.const_data_ptr();
  arguments.x_type = x_scale ? Element::kInt8 : element_of(x.scalar_type());
  arguments.x_scale = scale ? static_cast<float const*>(scale->const_data_ptr()) : nullptr;
  arguments.weight = static_cast<uint8_t const*>(weight.packed.const_data_ptr());
  arguments.weight_scale = static_cast<float const*>(weight.scale.const_data_ptr());
  arguments.bias = bias ? static_cast<float const*>(bias->const_data_ptr()) : nullptr;
  arguments.y = y.mutable_data_ptr();
  arguments.y_type = element_of(out_type);
  arguments.m = rows_of(x);
  arguments.n = n;
  arguments.k = k;
  cpu::gemm(kernels, arguments, on_torch_threads);
  return y;
}

Tensor gemm_op(Tensor const& x,
               Tensor const& x_scale,
               Tensor const& weight,
               Tensor const& weight_scale,
               OptionalTensor const& bias,
               OptionalType const& out_dtype) {
  check_quantized_rows(x, x_scale);
  const Weight checked = checked_weight(x, weight, weight_scale, bias);
  const ScalarType out_type = checked_out_type(out_dtype, bias);
  if (cpu::Kernels const* const kernels = cpu::current_kernels())
    return multiply(*kernels, x, x_scale, checked, out_type);
  std::array stack{from(x),    from(x_scale), from(weight), from(weight_scale),
                   from(bias), from(out_type)};
  call_reference("liquidgemm_reference::gemm", stack);
  return to<Tensor>(stack[0]);
}

Tensor linear_op(Tensor const& x,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias) {
  check_rows(x, kFloats);
  const Weight checked = checked_weight(x, weight, weight_scale, bias);
  if (cpu::Kernels const* const kernels = cpu::current_kernels())
    return multiply(*kernels, x, std::nullopt, checked, x.scalar_type());
  std::array stack{from(x), from(weight), from(weight_scale), from(bias)};
  call_reference("liquidgemm_reference::linear", stack);
  return to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> quantize_activation_op(Tensor const& x) {
  check_rows(x, kFloats);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(x), StableIValue{}};
    call_reference("liquidgemm_reference::quantize_activation", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const std::vector<int64_t> leading = leading_sizes(x);
  const int64_t k = x.size(-1);
  Tensor x8 = torch::stable::new_empty(x, with_last(leading, k), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, leading, ScalarType::Float);
  const Tensor rows = torch::stable::contiguous(x);
  const cpu::QuantizeArguments arguments{rows.const_data_ptr(),
                                         element_of(x.scalar_type()),
                                         static_cast<int8_t*>(x8.mutable_data_ptr()),
                                         static_cast<float*>(scale.mutable_data_ptr()),
                                         rows_of(x),
                                         k};
  cpu::quantize_activation(*kernels, arguments, on_torch_threads);
  return {x8, scale};
}

// `_search` of liquidgemm/quantize.py, whose docstring says what it takes and returns.
std::tuple<Tensor, Tensor, Tensor, Tensor> search(Tensor const& units,
                                                  int64_t rows,
                                                  OptionalTensor const& weight) {
  check_dtype("units", units, {ScalarType::Float});
  check(units.dim() == 2 && units.size(0) > 0 && rows > 0 && units.size(1) > 0 &&
            units.size(1) % rows == 0,
        "units: expected shape [span, ", rows, " * G], got ", shape_of(units));
  const int64_t span = units.size(0), columns = units.size(1);
  if (weight) {
    check_dtype("weight", *weight, {ScalarType::Float});
    check_shape("weight", *weight, {span, columns});
  }
  cpu::Kernels const* const kernels = cpu::current_kernels();
  check(kernels != nullptr, "search: expected kernels, the reference is chosen");
  const Tensor x = torch::stable::contiguous(units);
  OptionalTensor errors;
  if (weight)
    errors = torch::stable::contiguous(*weight);
  Tensor s = torch::stable::new_empty(units, {columns}),
         z = torch::stable::new_empty(units, {columns});
  Tensor q = torch::stable::new_empty(units, {span, columns});
  Tensor refit = torch::stable::new_empty(units, {rows});
  const int64_t bytes = cpu::search_scratch(span, columns);
  // 64 more bytes: the memory of a tensor of this size may be aligned to 16 only.
  Tensor scratch = torch::stable::new_empty(units, {bytes + 64}, ScalarType::Byte);
  const uintptr_t memory = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  kernels->search(
      {static_cast<float const*>(x.const_data_ptr()),
       errors ? static_cast<float const*>(errors->const_data_ptr()) : nullptr, span, columns, rows,
       static_cast<float*>(s.mutable_data_ptr()), static_cast<float*>(z.mutable_data_ptr()),
       static_cast<float*>(q.mutable_data_ptr()), static_cast<float*>(refit.mutable_data_ptr()),
       reinterpret_cast<void*>(ceil_div(memory, 64) * 64)});
  return {s, z, q, refit};
}

std::vector<std::string> cpu_kernels() {
  int count;
  cpu::Kernels const* const* const sets = cpu::supported_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i)
    names.push_back(sets[i]->name);
  return names;
}

std::string cpu_kernel() {
  cpu::Kernels const* const kernels = cpu::current_kernels();
  return kernels ? kernels->name : "reference";
}

void set_cpu_kernel(std::string name) {
  check(cpu::choose_kernels(name.c_str()), "name: no CPU kernel is called ", name);
}

}  // namespace
}  // namespace liquidgemm::binding

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CPU, m) {
  using namespace liquidgemm::binding;
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_op));
  m.impl("gemm", TORCH_BOX(&gemm_op));
  m.impl("linear", TORCH_BOX(&linear_op));
}

// What liquidgemm/_cpu.py makes public.
STABLE_TORCH_LIBRARY(liquidgemm_cpu, m) {
  m.def("kernels() -> str[]");
  m.def("kernel() -> str");
  m.def("set_kernel(str name) -> ()");
  m.def("search(Tensor units, int rows, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_cpu, CompositeExplicitAutograd, m) {
  using namespace liquidgemm::binding;
  m.impl("kernels", TORCH_BOX(&cpu_kernels));
  m.impl("kernel", TORCH_BOX(&cpu_kernel));
  m.impl("set_kernel", TORCH_BOX(&set_cpu_kernel));
  m.impl("search", TORCH_BOX(&search));
}
