// A layer of experts: which rows they get, and what becomes of their outputs. Between these lie two
// grouped products, see grouped_gemm.hpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/expert_ids.hpp"
#include "liquidgemm/grouped_gemm.hpp"
#include "liquidgemm/plan/moe_plan.hpp"
#include "liquidgemm/slot_gemm.hpp"

namespace liquidgemm {

inline constexpr int kMostScheduledExperts = 16384;

// Slot t * top_k + j is the j-th choice of token t.
struct MoeScheduleArguments {
  void const* topk_ids;  // [slots], int32_t or int64_t
  bool ids_are_64_bits;
  int64_t slots;         // below 2^31
  int experts;           // at most kMostScheduledExperts
  int32_t* offsets;      // [experts + 1]
  int32_t* row_of_slot;  // [slots]; -1 where the id is none of 0 to experts - 1
  int32_t* slot_of_row;  // [slots]; -1 from offsets[experts] on
};

// Enqueues a stable counting sort of the slots by expert. Never synchronizes, never allocates.
cudaError_t moe_schedule(MoeScheduleArguments const& arguments, cudaStream_t stream);

// Which row of x becomes which of the output, by quantize_activation's formula.
enum class RowOrder {
  kGather,   // row r is x[index[r] / top_k]; [rows]
  kInPlace,  // row r is x[r] where index[r] >= 0; [rows]. The index was complete before the
             // previous kernel on the stream could let this one start, and is read while that one
             // runs.
  kScatter,  // x[t] becomes the rows index[t * top_k] to index[t * top_k + top_k - 1]; [tokens,
             // top_k]
};
struct QuantizeRowsArguments {
  void const* x;         // [tokens, k] without gaps
  Element x_type;        // kBFloat16, kFloat16 or kFloat32
  int32_t const* index;  // a negative entry is no row, and neither is one past the last
  RowOrder order;
  int top_k;
  int8_t* out;         // [rows, k]
  int64_t out_stride;  // bytes between rows
  float* scale;        // [rows]
  int64_t tokens, rows, k;
};

// Enqueues it. Unless rows stay in place, a kernel after this one that starts early starts after
// those before this one have finished. Never synchronizes, never allocates.
cudaError_t quantize_rows(QuantizeRowsArguments const& arguments, cudaStream_t stream);

struct MoeCombineArguments {
  void const* y;  // [rows, n] without gaps
  Element type;   // of y, residual and out: kBFloat16, kFloat16 or kFloat32
  // [tokens * top_k]; slots whose row is none of y's are left out. Null where each slot has the row
  // of its own number, and those without an expert are left out.
  int32_t const* row_of_slot;
  ExpertIds ids;         // if row_of_slot is null
  void const* weights;   // [tokens, top_k]
  Element weights_type;  // as type
  void const* residual;  // [tokens, n] without gaps, or null
  void* out;             // [tokens, n] without gaps
  int64_t tokens, rows, n;
  int top_k;
  // Whether row_of_slot was complete before the previous kernel on the stream could let this one
  // start: then it is read while that one runs.
  bool rows_are_visible;
};

// Enqueues out = residual + sum of weights * y[row_of_slot] over a token's slots in their order, in
// fp32, each operation rounded; then to the type. Never synchronizes, never allocates.
cudaError_t moe_combine(MoeCombineArguments const& arguments, cudaStream_t stream);

// The whole layer: schedule, quantization by token, first product with its activation, quantization
// of the result, second product, combination. Between them, all intermediates are of x's type.
struct MoeArguments {
  void const* x;         // [tokens, hidden] without gaps
  Element type;          // of x and out: kBFloat16, kFloat16 or kFloat32
  void const* topk_ids;  // [tokens, top_k], int32_t or int64_t
  bool ids_are_64_bits;
  void const* topk_weights;  // [tokens, top_k]
  Element weights_type;
  ExpertWeights first, second;  // [2 intermediate, hidden], interleaved; [hidden, intermediate]
  GatedActivation gate;
  void* out;  // [tokens, hidden] without gaps
  int64_t tokens;
  int top_k;
};

// The plan that the library selects, as if the router had chosen experts at random.
MoePlan plan_moe(MoeProblem const& problem);

int64_t moe_workspace_bytes(Element type, MoePlan const& plan);

// `workspace`: so many bytes, aligned to 256. Never synchronizes, never allocates.
cudaError_t moe(MoeArguments const& arguments,
                MoePlan const& plan,
                void* workspace,
                cudaStream_t stream);

}  // namespace liquidgemm
