// What the CPU ops share: threads, and the reference that computes where no kernel is chosen.
#pragma once

#include <array>

#include "../product.hpp"
#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::binding {

inline void on_torch_threads(int64_t count, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Calls an op of liquidgemm/ops/_reference.py; the results take the places of the first arguments.
template <size_t N>
void call_reference(char const* op, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace liquidgemm::binding
