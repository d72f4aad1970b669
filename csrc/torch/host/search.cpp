#include "../product.hpp"
#include "liquidgemm/cpu/gemm.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

std::tuple<Tensor, Tensor, Tensor, Tensor> search_cpu(Tensor const& units,
                                                      int64_t rows,
                                                      OptionalTensor const& weight,
                                                      int64_t largest_code) {
  check_dtype("units", units, {ScalarType::Float});
  check(units.dim() == 2 && units.size(0) > 0 && rows > 0 && units.size(1) > 0 &&
            units.size(1) % rows == 0,
        "units: expected shape [span, ", rows, " * G], got ", shape_of(units));
  const int64_t span = units.size(0), columns = units.size(1);
  if (weight) {
    check_dtype("weight", *weight, {ScalarType::Float});
    check_shape("weight", *weight, {span, columns});
  }
  check(largest_code == 15 || largest_code == 63, "largest_code: expected 15 or 63, got ",
        largest_code);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  check(kernels != nullptr, "search: expected kernels, the reference is chosen");
  const Tensor x = dense(units);
  OptionalTensor errors;
  if (weight)
    errors = dense(*weight);
  Tensor s = allocate(units, {columns}, ScalarType::Float);
  Tensor z = allocate(units, {columns}, ScalarType::Float);
  Tensor q = allocate(units, {span, columns}, ScalarType::Float);
  Tensor refit = allocate(units, {rows}, ScalarType::Float);
  const int64_t bytes = cpu::search_scratch(span, columns);
  // 64 more bytes: the memory of a tensor of this size may be aligned to 16 only.
  Tensor scratch = allocate(units, {bytes + 64}, ScalarType::Byte);
  const uintptr_t memory = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  kernels->search(
      {static_cast<float const*>(x.const_data_ptr()),
       errors ? static_cast<float const*>(errors->const_data_ptr()) : nullptr, span, columns, rows,
       static_cast<float*>(s.mutable_data_ptr()), static_cast<float*>(z.mutable_data_ptr()),
       static_cast<float*>(q.mutable_data_ptr()), static_cast<float*>(refit.mutable_data_ptr()),
       reinterpret_cast<void*>(ceil_div(memory, 64) * 64), static_cast<int>(largest_code)});
  return {s, z, q, refit};
}

}  // namespace liquidgemm::binding
