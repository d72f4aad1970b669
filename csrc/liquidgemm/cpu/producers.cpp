#include "liquidgemm/cpu/producers.hpp"

#include <algorithm>

#include "liquidgemm/cpu/work.hpp"

namespace liquidgemm::cpu {
namespace {

void const* at(void const* memory, int64_t bytes) {
  return memory == nullptr ? nullptr : static_cast<char const*>(memory) + bytes;
}
void* at(void* memory, int64_t bytes) {
  return memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
}

// `row_of(i)`: the arguments of row i; `quantize`: one of the kernels'.
template <class RowOf, class Quantize, class Arguments>
void for_rows(Arguments const& a, RowOf row_of, Quantize quantize, ParallelFor parallel_for) {
  auto rows = [&](int64_t begin, int64_t end) {
    const int64_t bytes = a.row.k * size_of(a.row.type);
    const Memory<char> y(a.row.y == nullptr ? bytes : 0);
    for (int64_t i = begin; i < end; ++i) {
      auto row = row_of(i, bytes);
      row.y = a.row.y == nullptr ? y.get() : at(a.row.y, i * bytes);
      a.scale[i] = quantize(row, a.out + i * a.row.k);
    }
  };
  run(parallel_for, a.m, std::max<int64_t>(1, kGrainActivations / a.row.k), rows);
}

}  // namespace

void rms_norm_quantize(Kernels const& kernels,
                       RmsNormArguments const& a,
                       ParallelFor parallel_for) {
  const auto row_of = [&](int64_t i, int64_t bytes) {
    RmsNormRow row = a.row;
    row.x = at(row.x, i * bytes);
    row.residual = at(row.residual, i * bytes);
    row.h = at(row.h, i * bytes);
    return row;
  };
  for_rows(a, row_of, kernels.rms_norm, parallel_for);
}

void glu_quantize(Kernels const& kernels, GluArguments const& a, ParallelFor parallel_for) {
  const auto row_of = [&](int64_t i, int64_t bytes) {
    GluRow row = a.row;
    row.gate_up = at(row.gate_up, i * 2 * bytes);
    return row;
  };
  for_rows(a, row_of, kernels.glu, parallel_for);
}

}  // namespace liquidgemm::cpu
