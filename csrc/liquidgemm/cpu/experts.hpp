// Layers of experts on the CPU: products of rows sorted by expert, and what surrounds them.
#pragma once

#include <cstdint>
#include <optional>

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::cpu {

// Of slots [0, slots) of a routing, stable by expert. Ids outside [0, experts) are dropped.
template <class Id>
void schedule(Id const* ids,
              int64_t slots,
              int64_t experts,
              int32_t* offsets,       // [experts + 1]
              int32_t* row_of_slot,   // [slots], -1: dropped
              int32_t* slot_of_row);  // [slots], -1 from offsets[experts] on

struct GroupedArguments {
  // As of one product, but that the weights of all experts follow each other, as do their scales
  // and biases; m rows at most.
  GemmArguments product;
  int32_t const* offsets;  // [experts + 1]; clamped to [0, m]
  int64_t experts;
  std::optional<GatedActivation> gate;  // y is [m, n / 2] with it
};

void grouped_gemm(Kernels const& kernels,
                  GroupedArguments const& arguments,
                  ParallelFor parallel_for);

struct QuantizeRowsArguments {
  QuantizeArguments quantize;  // out and scale have `rows` rows; x has m
  int32_t const* slot_of_row;  // [rows]
  int64_t rows, top_k;
};

void quantize_activation_rows(Kernels const& kernels,
                              QuantizeRowsArguments const& arguments,
                              ParallelFor parallel_for);

struct CombineArguments {
  void const* y;  // [rows, columns]
  Element type;   // of y, the residual and the output
  int64_t rows, columns;
  int32_t const* row_of_slot;  // [tokens * top_k]
  void const* weights;         // [tokens, top_k]
  Element weight_type;
  void const* residual;  // [tokens, columns] or null
  void* out;             // [tokens, columns]
  int64_t tokens, top_k;
};

void combine(CombineArguments const& arguments, ParallelFor parallel_for);

}  // namespace liquidgemm::cpu
