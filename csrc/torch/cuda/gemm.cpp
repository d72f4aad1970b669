#include "liquidgemm/gemm.hpp"

#include "liquidgemm/plan/select.hpp"
#include "ops.hpp"
#include "products.hpp"

namespace liquidgemm::binding {
namespace {

// int8 rows as TMA wants them: a 16-byte aligned base and row stride.
struct Rows {
  Tensor storage;
  int64_t stride;
};

Rows aligned_rows(Tensor const& x, int64_t m, int64_t k, cudaStream_t stream) {
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= k && x.stride(0) % 16 == 0 &&
      aligned_to_16(x)) {
    return {x, x.stride(0)};
  }
  const Tensor rows = dense(x);
  if (k % 16 == 0 && aligned_to_16(rows))
    return {rows, k};
  const int64_t stride = ceil_div(k, 16) * 16;
  Tensor padded = allocate(x, {m, stride}, ScalarType::Char);
  check_cuda(cudaMemcpy2DAsync(padded.mutable_data_ptr(), stride, rows.const_data_ptr(), k, k, m,
                               cudaMemcpyDeviceToDevice, stream),
             "x");
  return {padded, stride};
}

}  // namespace

Tensor gemm_with(char const* op,
                 Tensor const& x,
                 Tensor const& x_scale,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias,
                 OptionalType const& out_dtype,
                 bool follows_producer,
                 std::optional<Forced> const& forced) {
  check_quantized_rows(x, x_scale);
  const Weight w = aligned_weight(x, weight, weight_scale, bias);
  const ScalarType y_type = checked_out_type(out_dtype, bias);

  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device(op);
  const cudaStream_t stream = current_stream(x);
  const int64_t m = rows_of(x), n = w.n(), k = x.size(-1);
  const Problem problem = checked_problem(op, m, n, k, device, forced ? forced->num_sms : 0);
  Tensor y = allocate(x, with_last(leading_sizes(x), n), y_type);
  if (m == 0)
    return y;
  const Rows rows = aligned_rows(x, m, k, stream);
  const Tensor scale = dense(x_scale);
  const LaunchPlan plan = forced ? complete(problem, forced->plan, Activations::kReady)
                                 : plan_gemm(problem, follows_producer);
  const cudaError_t error =
      gemm({.x = rows.storage.const_data_ptr(),
            .x_type = Element::kInt8,
            .x_stride = rows.stride,
            .x_scale = static_cast<float const*>(scale.const_data_ptr()),
            .weight = static_cast<uint8_t const*>(w.packed.const_data_ptr()),
            .weight_scale = static_cast<float const*>(w.scale.const_data_ptr()),
            .bias = w.bias ? w.bias->const_data_ptr() : nullptr,
            .bias_type = w.bias ? element_of(w.bias->scalar_type()) : Element::kFloat32,
            .y = y.mutable_data_ptr(),
            .y_type = element_of(y_type),
            .y_stride = n},
           plan, stream);
  if (error != cudaSuccess)
    fail(op, ": ", explain(error), ", for ", to_string(plan));
  return y;
}

Tensor gemm_op(Tensor const& x,
               Tensor const& x_scale,
               Tensor const& weight,
               Tensor const& weight_scale,
               OptionalTensor const& bias,
               OptionalType const& out_dtype,
               bool follows_producer) {
  return gemm_with("gemm", x, x_scale, weight, weight_scale, bias, out_dtype, follows_producer);
}

}  // namespace liquidgemm::binding
