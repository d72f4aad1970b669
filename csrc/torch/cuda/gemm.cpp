#include "liquidgemm/gemm.hpp"

#include "liquidgemm/plan/select.hpp"
#include "ops.hpp"
#include "products.hpp"

namespace liquidgemm::binding {
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
  const Problem problem =
      checked_problem(op, m, n, k, w.format, device, forced ? forced->num_sms : 0);
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
