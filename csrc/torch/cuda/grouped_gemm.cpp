#include "liquidgemm/grouped_gemm.hpp"

#include "liquidgemm/plan/grouped.hpp"
#include "ops.hpp"
#include "products.hpp"

namespace liquidgemm::binding {

void check_countable(char const* op, GroupedPlan const& plan) {
  check(is_countable(plan), op, ": expected at most ", kMostExperts,
        " experts, and fewer tiles and channels of all than 2^30, got ", describe(plan));
}

Tensor grouped_gemm_with(char const* op,
                         Tensor const& x,
                         Tensor const& x_scale,
                         Experts const& weight,
                         Tensor const& offsets,
                         GroupedOutput const& out,
                         Offsets when,
                         std::optional<Forced> const& forced) {
  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device(op);
  const cudaStream_t stream = current_stream(x);
  const int64_t rows = x.size(0), experts = weight.count(), n = weight.n(), k = x.size(1);
  const int64_t outputs = out.gate ? n / 2 : n;
  Tensor y = allocate(x, {rows, outputs}, out.type);
  if (rows == 0)
    return y;
  const Problem p =
      checked_problem(op, rows, n, k, weight.format, device, forced ? forced->num_sms : 0);
  const GroupedProblem problem{rows, experts, n, k, p.num_sms, p.memory_bytes_per_us, p.format};
  const GroupedPlan plan = forced ? complete(problem, forced->plan) : plan_grouped_gemm(problem);
  check_countable(op, plan);
  const Rows x_rows = aligned_rows(x, rows, k, stream);
  const Tensor scale = dense(x_scale), ends = dense(offsets);
  const cudaError_t error =
      grouped_gemm({.x = x_rows.storage.const_data_ptr(),
                    .x_stride = x_rows.stride,
                    .x_scale = static_cast<float const*>(scale.const_data_ptr()),
                    .weights = view(weight),
                    .offsets = static_cast<int32_t const*>(ends.const_data_ptr()),
                    .gate = out.gate,
                    .y = y.mutable_data_ptr(),
                    .y_type = element_of(out.type),
                    .y_stride = outputs,
                    .offsets_are_visible = when == Offsets::kVisible},
                   plan, stream);
  if (error != cudaSuccess)
    fail(op, ": ", explain(error), ", for ", describe(plan));
  return y;
}

namespace {

Tensor checked_grouped_gemm(char const* op,
                            Tensor const& x,
                            Tensor const& x_scale,
                            Tensor const& weight,
                            Tensor const& weight_scale,
                            Tensor const& offsets,
                            OptionalTensor const& bias,
                            OptionalType const& out_dtype,
                            std::string const& activation,
                            std::optional<Forced> const& forced) {
  check_grouped_rows(x, x_scale);
  const Experts experts = aligned(checked_experts(x, x.size(1), {"weight", "weight_scale", "bias"},
                                                  weight, weight_scale, bias));
  check_offsets(offsets, x, experts.count());
  const GroupedOutput out = checked_grouped_output(experts, bias, out_dtype, activation);
  return grouped_gemm_with(op, x, x_scale, experts, offsets, out, Offsets::kFromPreviousKernel,
                           forced);
}

}  // namespace

Tensor grouped_gemm_op(Tensor const& x,
                       Tensor const& x_scale,
                       Tensor const& weight,
                       Tensor const& weight_scale,
                       Tensor const& offsets,
                       OptionalTensor const& bias,
                       OptionalType const& out_dtype,
                       std::string const& activation) {
  return checked_grouped_gemm("grouped_gemm", x, x_scale, weight, weight_scale, offsets, bias,
                              out_dtype, activation, std::nullopt);
}

Tensor grouped_gemm_with_plan_op(Tensor const& x,
                                 Tensor const& x_scale,
                                 Tensor const& weight,
                                 Tensor const& weight_scale,
                                 Tensor const& offsets,
                                 OptionalTensor const& bias,
                                 OptionalType const& out_dtype,
                                 std::string const& activation,
                                 int64_t plan,
                                 int64_t num_sms) {
  const int64_t plans = all_grouped_plans().size();
  check(plan >= 0 && plan < plans, "plan: expected 0 to ", plans - 1, ", got ", plan);
  check(num_sms >= 0 && num_sms <= INT32_MAX, "num_sms: expected 0 (all) or more, got ", num_sms);
  const Forced forced{all_grouped_plans()[plan], static_cast<int>(num_sms)};
  return checked_grouped_gemm("grouped_gemm_with_plan", x, x_scale, weight, weight_scale, offsets,
                              bias, out_dtype, activation, forced);
}

}  // namespace liquidgemm::binding
