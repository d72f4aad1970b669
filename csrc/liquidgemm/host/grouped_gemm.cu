// From a plan of a grouped GEMM to a launch: as gemm.cu.
#include "liquidgemm/grouped_gemm.hpp"

#include <array>
#include <utility>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/host/launch.hpp"
#include "liquidgemm/host/tensor_map.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/grouped.hpp"
#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/plan/grouped.hpp"

namespace liquidgemm {
namespace {

struct TileKernel {
  TileShape tile;
  bool stores_by_tma;
  cudaError_t (*launch)(GroupedParams const&, int, cudaStream_t);
};

template <class Format, int... I>
constexpr std::array<TileKernel, sizeof...(I)> tile_kernels(std::integer_sequence<int, I...>) {
  return {TileKernel{
      .tile = kGroupedTileShapes[I],
      .stores_by_tma = Tile<kGroupedTileShapes[I], Format>::kStoresByTma,
      .launch = &launch<kGroupedTileShapes[I], Format, int8_t, GroupedWork>,
  }...};
}
template <class Format>
constexpr auto kTileKernels =
    tile_kernels<Format>(std::make_integer_sequence<int, kNumGroupedTileShapes>{});

// Null if the tile is not compiled for weights of this format.
template <class Format>
TileKernel const* find_kernel(TileShape const& tile) {
  if constexpr (has_grouped_kernels<Format>()) {
    for (TileKernel const& kernel : kTileKernels<Format>) {
      if (kernel.tile == tile)
        return &kernel;
    }
  }
  return nullptr;
}
TileKernel const* find_kernel(FormatId format, TileShape const& tile) {
  return visit_format(format,
                      [&](auto of) { return find_kernel<typename decltype(of)::type>(tile); });
}

}  // namespace

cudaError_t grouped_gemm(GroupedGemmArguments const& a,
                         GroupedPlan const& plan,
                         cudaStream_t stream) {
  GroupedProblem const& p = plan.problem;
  TileKernel const* const kernel = find_kernel(p.format, plan.plan.tile);
  const bool aligned = reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && a.y_stride % 8 == 0;
  if (!kernel || !is_countable(plan) ||
      (a.gate && (p.n % 16 != 0 || !aligned || a.y_type == Element::kInt32)))
    return cudaErrorInvalidValue;
  if (p.rows == 0)
    return cudaSuccess;
  const int experts = static_cast<int>(p.experts);
  GroupedParams params{
      .maps = {},
      .weights = {.packed = a.weights.packed},
      .output = {.x_scale = a.x_scale,
                 .weight_scale = a.weights.scale,
                 .bias = a.weights.bias,
                 .y = a.y,
                 .y_stride = a.y_stride,
                 .bias_type = a.weights.bias_type,
                 .y_type = a.y_type},
      .sizes = {.m = static_cast<int>(p.rows),
                .n = static_cast<int>(p.n),
                .panels = static_cast<int>(ceil_div(p.n, kBlockRows)),
                .k_blocks = static_cast<int>(ceil_div(p.k, kBlockK))},
      .work = {.offsets = a.offsets,
               .experts = experts,
               .experts_per_lane = static_cast<int>(ceil_div(experts, 32)),
               .n_tiles = cutlass::FastDivmod(plan.n_tiles),
               .band_tiles = cutlass::FastDivmod(kBandTiles * plan.n_tiles),
               .tile_tokens = plan.tile_tokens,
               .cluster = {.log2_split = cute::log_2(static_cast<unsigned>(plan.plan.split_k)),
                           .pairs = false},
               .weights_are_read_once = plan.weights_are_read_once,
               .offsets_are_visible = a.offsets_are_visible,
               .gated = a.gate.has_value(),
               .gate = a.gate.value_or(GatedActivation{})},
      .prefetch = {.eighths_ahead = plan.eighths_ahead, .stages_ahead = 0},
      .tokens = {.source = nullptr, .k = static_cast<int>(p.k)},
  };
  cudaError_t error = encode(params.maps.tokens, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.x, p.rows, p.k,
                             a.x_stride, plan.tile_tokens);
  const bool two_bytes = a.y_type == Element::kBFloat16 || a.y_type == Element::kFloat16;
  if (error == cudaSuccess && kernel->stores_by_tma && two_bytes &&
      params.output.rows_are_vectors(params.sizes)) {
    error = encode(params.maps.output, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.y, p.rows,
                   a.gate ? p.n / 2 : p.n, a.y_stride * 2, plan.plan.tile.store_tokens(),
                   a.gate ? 64 : 128);
  }
  if (error != cudaSuccess)
    return error;
  return kernel->launch(params, plan.workers, stream);
}

}  // namespace liquidgemm
