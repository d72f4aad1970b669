// The CPU side of the torch ops.
#pragma once

#include <tuple>

#include "../weight.hpp"

namespace liquidgemm::binding {

Tensor pack_weight_cpu(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset);
std::tuple<Tensor, Tensor, Tensor> unpack_weight_cpu(Tensor const& packed, int64_t n);

std::vector<std::string> plan_names();
std::vector<int64_t> plausible_plans(int64_t m);
// JSON, see plan/explain.hpp. `quantizes`: of a linear layer with 16-bit activations.
std::string explain_plan(
    int64_t m, int64_t n, int64_t k, bool quantizes, int64_t num_sms, double memory_tbps);

}  // namespace liquidgemm::binding
