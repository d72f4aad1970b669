// What tests and benchmarks run: any plan, on any number of SMs.
#include "liquidgemm/plan/all_plans.hpp"
#include "ops.hpp"
#include "products.hpp"

namespace liquidgemm::binding {
namespace {

Forced checked_forced(int64_t plan, int64_t num_sms) {
  const int64_t plans = all_plans().size();
  check(plan >= 0 && plan < plans, "plan: expected 0 to ", plans - 1, ", got ", plan);
  check(num_sms >= 0 && num_sms <= INT32_MAX, "num_sms: expected 0 (all) or more, got ", num_sms);
  return {all_plans()[plan], static_cast<int>(num_sms)};
}

}  // namespace

Tensor gemm_with_plan_op(Tensor const& x,
                         Tensor const& x_scale,
                         Tensor const& weight,
                         Tensor const& weight_scale,
                         OptionalTensor const& bias,
                         OptionalType const& out_dtype,
                         int64_t plan,
                         int64_t num_sms) {
  return gemm_with("gemm_with_plan", x, x_scale, weight, weight_scale, bias, out_dtype, false,
                   checked_forced(plan, num_sms));
}

Tensor linear_with_plan_op(Tensor const& x,
                           Tensor const& weight,
                           Tensor const& weight_scale,
                           OptionalTensor const& bias,
                           int64_t plan,
                           int64_t num_sms) {
  return linear_with("linear_with_plan", x, weight, weight_scale, bias,
                     checked_forced(plan, num_sms));
}

}  // namespace liquidgemm::binding
