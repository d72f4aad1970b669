#include "liquidgemm/linear.hpp"

#include "liquidgemm/plan/select.hpp"
#include "ops.hpp"
#include "products.hpp"
#include "workspace.hpp"

namespace liquidgemm::binding {

Tensor linear_with(char const* op,
                   Tensor const& x,
                   Tensor const& weight,
                   Tensor const& weight_scale,
                   OptionalTensor const& bias,
                   std::optional<Forced> const& forced) {
  check_rows(x, kFloats);
  const Weight w = aligned_weight(x, weight, weight_scale, bias);

  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device(op);
  const cudaStream_t stream = current_stream(x);
  const int64_t m = rows_of(x), n = w.n(), k = x.size(-1);
  const Problem problem =
      checked_problem(op, m, n, k, w.format, device, forced ? forced->num_sms : 0);
  Tensor y = allocate(x, with_last(leading_sizes(x), n), x.scalar_type());
  if (m == 0)
    return y;
  const Tensor rows = dense(x);
  const Element type = element_of(x.scalar_type());
  const bool is_readable = kernel_can_read(type, rows.const_data_ptr());
  if (forced) {
    check(is_readable && can_quantize_in_kernel(m, k, forced->plan), "plan: ", name(forced->plan),
          " cannot quantize ", m, " tokens of K = ", k);
  }
  const LaunchPlan plan = forced ? complete(problem, forced->plan, Activations::kQuantizeInKernel)
                                 : plan_linear(problem, is_readable);
  const Workspace workspace(x, linear_workspace_bytes(plan));
  const cudaError_t error =
      linear({.x = rows.const_data_ptr(),
              .x_type = type,
              .weight = static_cast<uint8_t const*>(w.packed.const_data_ptr()),
              .weight_scale = static_cast<float const*>(w.scale.const_data_ptr()),
              .bias = w.bias ? w.bias->const_data_ptr() : nullptr,
              .bias_type = w.bias ? element_of(w.bias->scalar_type()) : Element::kFloat32,
              .y = y.mutable_data_ptr(),
              .y_type = type,
              .y_stride = n},
             plan, workspace.data(), stream);
  if (error != cudaSuccess)
    fail(op, ": ", explain(error), ", for ", to_string(plan));
  return y;
}

Tensor linear_op(Tensor const& x,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias) {
  return linear_with("linear", x, weight, weight_scale, bias);
}

}  // namespace liquidgemm::binding
