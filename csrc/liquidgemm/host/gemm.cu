// From a plan to a launch: finds the kernel of its tile and fills in what the kernel reads.
#include "liquidgemm/gemm.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <utility>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/host/launch.hpp"
#include "liquidgemm/host/tensor_map.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"
#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/plan/rules.hpp"
#include "liquidgemm/plan/tiles.hpp"

namespace liquidgemm {
namespace {

using Launcher = cudaError_t (*)(DenseParams const&, int, cudaStream_t);  // int: clusters

// The kernels of one tile, by the type of their activations; null where none is compiled.
struct TileKernels {
  TileShape tile;
  bool stores_by_tma;
  Launcher of_int8, of_bfloat16, of_float16;

  Launcher launcher(Element x_type) const {
    switch (x_type) {
      case Element::kInt8:
        return of_int8;
      case Element::kBFloat16:
        return of_bfloat16;
      case Element::kFloat16:
        return of_float16;
      default:
        return nullptr;
    }
  }
};

template <TileShape tile, class Format, Element x_type, class Input>
constexpr Launcher launcher() {
  if constexpr (supports<Format>(tile, x_type)) {
    return &launch<tile, Format, Input>;
  } else {
    return nullptr;
  }
}

// Not every tile can be made of every format.
template <TileShape tile, class Format>
constexpr bool stores_by_tma() {
  if constexpr (supports<Format>(tile, Element::kInt8))
    return Tile<tile, Format>::kStoresByTma;
  else
    return false;
}

template <class Format, int... I>
constexpr std::array<TileKernels, sizeof...(I)> tile_kernels(std::integer_sequence<int, I...>) {
  return {TileKernels{
      .tile = kTileShapes[I],
      .stores_by_tma = stores_by_tma<kTileShapes[I], Format>(),
      .of_int8 = launcher<kTileShapes[I], Format, Element::kInt8, int8_t>(),
      .of_bfloat16 = launcher<kTileShapes[I], Format, Element::kBFloat16, __nv_bfloat16>(),
      .of_float16 = launcher<kTileShapes[I], Format, Element::kFloat16, __half>(),
  }...};
}
template <class Format>
constexpr auto kTileKernels =
    tile_kernels<Format>(std::make_integer_sequence<int, kNumTileShapes>{});

// Null if the tile is not compiled for weights of this format.
template <class Format>
TileKernels const* find_kernels(TileShape const& tile) {
  for (TileKernels const& kernels : kTileKernels<Format>) {
    if (kernels.tile == tile)
      return &kernels;
  }
  return nullptr;
}
TileKernels const* find_kernels(FormatId format, TileShape const& tile) {
  return visit_format(format,
                      [&](auto of) { return find_kernels<typename decltype(of)::type>(tile); });
}

}  // namespace

cudaError_t gemm(GemmArguments const& a, LaunchPlan const& launch_plan, cudaStream_t stream) {
  Problem const& p = launch_plan.problem;
  Plan const& plan = launch_plan.plan;
  Division const& division = launch_plan.division;
  const bool quantizes = launch_plan.activations == Activations::kQuantizeInKernel;
  TileKernels const* const kernels = find_kernels(p.format, plan.tile);
  const Launcher launch = kernels ? kernels->launcher(a.x_type) : nullptr;
  if (!launch || quantizes != (a.x_type != Element::kInt8) ||
      (quantizes && !can_quantize_in_kernel(p.m, p.k, plan)))
    return cudaErrorInvalidValue;
  DenseParams params{
      .maps = {},
      .weights = {.packed = a.weight},
      .output = {.x_scale = a.x_scale,
                 .weight_scale = a.weight_scale,
                 .bias = a.bias,
                 .y = a.y,
                 .y_stride = a.y_stride,
                 .bias_type = a.bias_type,
                 .y_type = a.y_type},
      .sizes = {.m = static_cast<int>(p.m),
                .n = static_cast<int>(p.n),
                .panels = static_cast<int>(ceil_div(p.n, kBlockRows)),
                .k_blocks = static_cast<int>(ceil_div(p.k, kBlockK))},
      .work = {.m_tiles = division.m_tiles,
               .n_tiles = division.n_tiles,
               .band_tiles = cutlass::FastDivmod(kBandTiles * division.n_tiles),
               .band_height = cutlass::FastDivmod(kBandTiles),
               .last_band_height = cutlass::FastDivmod(std::max(1, division.m_tiles % kBandTiles)),
               .tile_tokens = division.tile_tokens,
               .cluster = {.log2_split = cute::log_2(static_cast<unsigned>(plan.split_k)),
                           .pairs = plan.pairs},
               .whole_rounds = division.whole_rounds,
               .split_tiles = division.split_tiles},
      .prefetch = {.eighths_ahead = launch_plan.eighths_ahead,
                   .stages_ahead = launch_plan.stages_ahead},
      .tokens = {.source = quantizes ? a.x : nullptr, .k = static_cast<int>(p.k)},
  };
  cudaError_t error = cudaSuccess;
  if (!quantizes) {
    error = encode(params.maps.tokens, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.x, p.m, p.k, a.x_stride,
                   division.tile_tokens / (plan.pairs ? 2 : 1));
  }
  const bool two_bytes = a.y_type == Element::kBFloat16 || a.y_type == Element::kFloat16;
  if (error == cudaSuccess && kernels->stores_by_tma && two_bytes &&
      params.output.rows_are_vectors(params.sizes))
    error = encode(params.maps.output, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.y, p.m, p.n,
                   a.y_stride * 2, plan.tile.store_tokens());
  if (error != cudaSuccess)
    return error;
  return launch(params, division.workers, stream);
}

}  // namespace liquidgemm
