#include "liquidgemm/cpu/experts.hpp"

#include <algorithm>
#include <vector>

#include "liquidgemm/cpu/activation.hpp"
#include "liquidgemm/cpu/layout.hpp"
#include "liquidgemm/cpu/work.hpp"

namespace liquidgemm::cpu {
namespace {

// Channels of the gate, and as many of the other half, that follow each other.
constexpr int64_t kInterleave = 8;

constexpr int64_t round_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}

char const* at(void const* memory, int64_t bytes) {
  return static_cast<char const*>(memory) + bytes;
}
char* at(void* memory, int64_t bytes) {
  return static_cast<char*>(memory) + bytes;
}

template <class T>
T from_float(float value);
template <>
float from_float(float value) {
  return value;
}
template <>
BFloat16 from_float(float value) {
  return to_bfloat16(value);
}
template <>
Float16 from_float(float value) {
  return to_float16(value);
}

// Calls function(T{}) with the type of the element.
template <class Function>
void with_type(Element type, Function const& function) {
  switch (type) {
    case Element::kBFloat16:
      return function(BFloat16{});
    case Element::kFloat16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

// out[8j + i] of y[16j + i] and y[16j + 8 + i]
template <GatedActivation kActivation, class T>
void activate(T const* y, int64_t channels, T* out) {
  const auto round = [](float value) { return to_float(from_float<T>(value)); };
  for (int64_t block = 0; block < channels; block += kInterleave) {
    T const* const gate = y + 2 * block;
    for (int64_t i = 0; i < kInterleave; ++i) {
      const float value =
          gated<kActivation>(to_float(gate[i]), to_float(gate[kInterleave + i]), round);
      out[block + i] = from_float<T>(value);
    }
  }
}

template <class T>
void activate(T const* y, int64_t channels, GatedActivation activation, T* out) {
  switch (activation) {
    case GatedActivation::kSiluMul:
      return activate<GatedActivation::kSiluMul>(y, channels, out);
    case GatedActivation::kGeluTanhMul:
      return activate<GatedActivation::kGeluTanhMul>(y, channels, out);
    case GatedActivation::kSwigluClamped:
      return activate<GatedActivation::kSwigluClamped>(y, channels, out);
  }
}

template <class T>
void add_weighted(void const* row, float weight, int64_t columns, float* sums) {
  T const* const y = static_cast<T const*>(row);
  for (int64_t i = 0; i < columns; ++i)
    sums[i] += weight * to_float(y[i]);
}

template <class T>
void combine_tokens(CombineArguments const& a, int64_t begin, int64_t end) {
  const Memory<float> sums(a.columns);
  for (int64_t token = begin; token < end; ++token) {
    T const* const residual = static_cast<T const*>(a.residual) + token * a.columns;
    for (int64_t i = 0; i < a.columns; ++i)
      sums[i] = a.residual ? to_float(residual[i]) : 0.f;
    for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
      const int64_t row = a.row_of_slot[slot];
      if (row < 0 || row >= a.rows)
        continue;
      float weight = 0.f;
      with_type(a.weight_type, [&](auto type) {
        weight = to_float(static_cast<decltype(type) const*>(a.weights)[slot]);
      });
      add_weighted<T>(at(a.y, row * a.columns * int64_t{sizeof(T)}), weight, a.columns, sums.get());
    }
    T* const out = static_cast<T*>(a.out) + token * a.columns;
    for (int64_t i = 0; i < a.columns; ++i)
      out[i] = from_float<T>(sums[i]);
  }
}

}  // namespace

template <class Id>
void schedule(Id const* ids,
              int64_t slots,
              int64_t experts,
              int32_t* offsets,
              int32_t* row_of_slot,
              int32_t* slot_of_row) {
  const auto inside = [&](int64_t id) { return id >= 0 && id < experts; };
  std::fill_n(offsets, experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (inside(ids[slot]))
      ++offsets[ids[slot] + 1];
  }
  for (int64_t e = 0; e < experts; ++e)
    offsets[e + 1] += offsets[e];
  std::vector<int32_t> next(offsets, offsets + experts);
  std::fill_n(slot_of_row, slots, -1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t row = inside(ids[slot]) ? next[size_t(ids[slot])]++ : -1;
    row_of_slot[slot] = row;
    if (row >= 0)
      slot_of_row[row] = int32_t(slot);
  }
}

template void schedule(int32_t const*, int64_t, int64_t, int32_t*, int32_t*, int32_t*);
template void schedule(int64_t const*, int64_t, int64_t, int32_t*, int32_t*, int32_t*);

void grouped_gemm(Kernels const& kernels, GroupedArguments const& a, ParallelFor parallel_for) {
  GemmArguments const& all = a.product;
  const int64_t panels = round_up(all.n, kPanel) / kPanel;
  const int64_t groups = round_up(all.k, kGroup) / kGroup;
  const int64_t weight_bytes = panels * groups * Nibbles::kBlock;
  const int64_t size = size_of(all.y_type);
  const int64_t columns = a.gate ? all.n / 2 : all.n;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int64_t first = std::clamp<int64_t>(a.offsets[e], 0, all.m);
    const int64_t rows = std::clamp<int64_t>(a.offsets[e + 1], 0, all.m) - first;
    if (rows <= 0)
      continue;
    GemmArguments one = all;
    one.x = at(all.x, first * all.k);
    one.x_scale = all.x_scale + first;
    one.weight = all.weight + e * weight_bytes;
    one.weight_scale = all.weight_scale + e * all.n;
    one.bias = all.bias ? all.bias + e * all.n : nullptr;
    one.y = at(all.y, first * columns * size);
    one.m = rows;
    if (!a.gate) {
      gemm(kernels, one, parallel_for);
      continue;
    }
    const Memory<char> product(rows * all.n * size);
    void* const y = one.y;
    one.y = product.get();
    gemm(kernels, one, parallel_for);
    auto activate_rows = [&](int64_t begin, int64_t end) {
      with_type(all.y_type, [&](auto type) {
        using T = decltype(type);
        for (int64_t row = begin; row < end; ++row)
          activate(reinterpret_cast<T const*>(product.get()) + row * all.n, columns, *a.gate,
                   static_cast<T*>(y) + row * columns);
      });
    };
    run(parallel_for, rows, std::max<int64_t>(1, kGrainActivations / all.n), activate_rows);
  }
}

void quantize_activation_rows(Kernels const& kernels,
                              QuantizeRowsArguments const& a,
                              ParallelFor parallel_for) {
  QuantizeArguments const& q = a.quantize;
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = a.slot_of_row[row], token = slot / a.top_k;
      if (slot < 0 || token >= q.m)
        continue;
      char const* const x = at(q.x, token * q.k * size_of(q.x_type));
      q.scale[row] = kernels.quantize(x, q.x_type, q.k, q.out + row * q.k);
    }
  };
  run(parallel_for, a.rows, std::max<int64_t>(1, kGrainActivations / q.k), rows);
}

void combine(CombineArguments const& a, ParallelFor parallel_for) {
  auto tokens = [&](int64_t begin, int64_t end) {
    with_type(a.type, [&](auto type) { combine_tokens<decltype(type)>(a, begin, end); });
  };
  const int64_t work = a.columns * (a.top_k + 1);
  run(parallel_for, a.tokens, std::max<int64_t>(1, kGrainActivations / work), tokens);
}

}  // namespace liquidgemm::cpu
