// Which kernel runs a problem, with everything that its launch needs. Plans are selected by a
// pure function of the problem (plan/select.hpp) and remembered, per thread.
#pragma once

#include <string>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm {

// For gemm(). m, n and k must be positive, k at most kMaxK (common/int8.hpp).
// `follows_producer`: whether the kernel
// that writes the activations is launched right before.
LaunchPlan plan_gemm(Problem const& problem, bool follows_producer = false);

// For linear(). `x_is_readable`: see kernel_can_read.
LaunchPlan plan_linear(Problem const& problem, bool x_is_readable);

// Whether a kernel can read activations [m, k] without gaps as they are, to quantize them itself:
// they have 16 bits, and are aligned to 16 bytes.
bool kernel_can_read(Element x_type, void const* x);

// One line in words: sizes, plan, estimated times.
std::string to_string(LaunchPlan const& plan);

}  // namespace liquidgemm
