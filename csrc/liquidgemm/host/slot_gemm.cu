// From a plan of a product by slots to a launch: as gemm.cu.
#include "liquidgemm/slot_gemm.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <utility>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/host/launch.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/slots.hpp"
#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/plan/grouped.hpp"
#include "liquidgemm/plan/slots.hpp"

namespace liquidgemm {
namespace {

using Launcher = cudaError_t (*)(SlotParams const&, int, cudaStream_t);

struct TileKernels {
  TileShape tile;
  Launcher of_bfloat16, of_float16;
};

template <int... I>
constexpr std::array<TileKernels, sizeof...(I)> tile_kernels(std::integer_sequence<int, I...>) {
  return {TileKernels{
      .tile = kSlotTileShapes[I],
      .of_bfloat16 = &launch<kSlotTileShapes[I], LiquidQuant, __nv_bfloat16, SlotWork>,
      .of_float16 = &launch<kSlotTileShapes[I], LiquidQuant, __half, SlotWork>,
  }...};
}
constexpr auto kTileKernels = tile_kernels(std::make_integer_sequence<int, kNumSlotTileShapes>{});

Launcher find_launcher(TileShape const& tile, Element type) {
  for (TileKernels const& kernels : kTileKernels) {
    if (kernels.tile == tile) {
      return type == Element::kBFloat16  ? kernels.of_bfloat16
             : type == Element::kFloat16 ? kernels.of_float16
                                         : nullptr;
    }
  }
  return nullptr;
}

}  // namespace

cudaError_t slot_gemm(SlotGemmArguments const& a, SlotPlan const& plan, cudaStream_t stream) {
  SlotProblem const& p = plan.problem;
  const Launcher launch = find_launcher(plan.plan.tile, a.type);
  const int64_t y_stride = a.gate ? p.n / 2 : p.n;
  const auto is_aligned = [](void const* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (!launch || !can_quantize_in_kernel(p.rows, p.k, plan.plan) || !is_aligned(a.x) ||
      !is_aligned(a.y) || y_stride % 8 != 0 || (a.gate && p.n % 16 != 0))
    return cudaErrorInvalidValue;
  const SlotParams params{
      .maps = {},
      .weights = {.packed = a.weights.packed},
      .output = {.x_scale = nullptr,
                 .weight_scale = a.weights.scale,
                 .bias = a.weights.bias,
                 .y = a.y,
                 .y_stride = y_stride,
                 .bias_type = a.weights.bias_type,
                 .y_type = a.type},
      .sizes = {.m = static_cast<int>(p.rows),
                .n = static_cast<int>(p.n),
                .panels = static_cast<int>(ceil_div(p.n, kBlockRows)),
                .k_blocks = static_cast<int>(ceil_div(p.k, kBlockK))},
      .work = {.ids = a.ids,
               .slots = cutlass::FastDivmod(static_cast<int>(p.slots)),
               .slots_per_row = cutlass::FastDivmod(a.slots_per_row),
               .cluster = {.log2_split = cute::log_2(static_cast<unsigned>(plan.plan.split_k)),
                           .pairs = false},
               .ids_are_visible = a.ids_are_visible,
               .gated = a.gate.has_value(),
               .gate = a.gate.value_or(GatedActivation{})},
      .prefetch = {.eighths_ahead = kWholeRing, .stages_ahead = 0},
      .tokens = {.source = a.x, .k = static_cast<int>(p.k)},
  };
  return launch(params, plan.workers, stream);
}

}  // namespace liquidgemm
