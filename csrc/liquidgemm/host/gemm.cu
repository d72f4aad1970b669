// The GEMM's host side below torch: device query, tensor map, dispatch over the compiled tiles.
#include "liquidgemm/gemm.hpp"

#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <mutex>
#include <utility>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/host/launch.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/plan/early_weights.hpp"
#include "liquidgemm/plan/tiles.hpp"

namespace liquidgemm {
namespace {

using Launcher = cudaError_t (*)(KernelParams const&, int, cudaStream_t);  // int: clusters

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

template <class Format, int... I>
constexpr std::array<TileKernels, sizeof...(I)> tile_kernels(std::integer_sequence<int, I...>) {
  return {TileKernels{
      .tile = kTileShapes[I],
      .stores_by_tma = Tile<kTileShapes[I], Format>::kStoresByTma,
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

// The driver's function without linking libcuda, which build machines lack.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encoder);
}

// Of a row-major matrix: boxes of rows x 128 bytes, with the swizzle of that size.
cudaError_t encode(CUtensorMap& map,
                   CUtensorMapDataType type,
                   int type_bytes,
                   void const* base,
                   int64_t rows,
                   int64_t columns,
                   int64_t stride_bytes,
                   int box_rows) {
  const auto encoder = tensor_map_encoder();
  if (!encoder)
    return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / type_bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encoder(&map, type, 2, const_cast<void*>(base), sizes, strides, box, element_strides,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t query(int device, DeviceInfo& info) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.num_sms, cudaDevAttrMultiProcessorCount, device);
  int kilohertz = 0, bits = 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device);
  info.compute_capability = 10 * major + minor;
  info.memory_bytes_per_us = 2e-3 * kilohertz * bits / 8;  // two transfers per clock
  return error;
}

}  // namespace

cudaError_t query_device(DeviceInfo& info) {
  constexpr int kMaxDevices = 64;
  static std::once_flag once[kMaxDevices];
  static DeviceInfo cached[kMaxDevices];
  static cudaError_t errors[kMaxDevices];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return error;
  if (device >= kMaxDevices)
    return query(device, info);
  std::call_once(once[device], [&] { errors[device] = query(device, cached[device]); });
  info = cached[device];
  return errors[device];
}

cudaError_t gemm(GemmArguments const& a, Plan const& plan, int num_sms, cudaStream_t stream) {
  if (a.m == 0 || a.n == 0)
    return cudaSuccess;
  const bool quantizes = a.x_type != Element::kInt8;
  TileKernels const* const kernels = find_kernels<LiquidQuant>(plan.tile);
  const Launcher launch = kernels ? kernels->launcher(a.x_type) : nullptr;
  if (!launch || (quantizes && !fits_quantized(a.m, a.k, plan)))
    return cudaErrorInvalidValue;
  const Division division = divide(a.m, a.n, a.k, plan, plan.workers(num_sms));
  KernelParams params{};
  params.weight = a.weight;
  params.x_scale = a.x_scale;
  params.weight_scale = a.weight_scale;
  params.bias = a.bias;
  params.y = a.y;
  params.y_stride = a.y_stride;
  params.bias_type = a.bias_type;
  params.y_type = a.y_type;
  params.m = static_cast<int>(a.m);
  params.n = static_cast<int>(a.n);
  params.k = static_cast<int>(a.k);
  params.panels = static_cast<int>(ceil_div(a.n, kBlockRows));
  params.k_blocks = static_cast<int>(ceil_div(a.k, kBlockK));
  params.m_tiles = division.m_tiles;
  params.n_tiles = division.n_tiles;
  params.band_units = cutlass::FastDivmod(kBandTiles * division.n_tiles);
  params.band_height = cutlass::FastDivmod(kBandTiles);
  params.last_band_height = cutlass::FastDivmod(std::max(1, division.m_tiles % kBandTiles));
  params.tile_tokens = division.tile_tokens;
  params.log2_split = cute::log_2(static_cast<unsigned>(plan.split_k));
  params.pairs = plan.pairs;
  params.eighths_ahead = eighths_ahead(plan, division, num_sms, quantizes, a.x_is_new);
  params.stages_ahead = stages_ahead(plan, division, num_sms, quantizes, a.x_is_new);
  params.whole_rounds = division.whole_rounds;
  params.split_tiles = division.split_tiles;
  cudaError_t error = cudaSuccess;
  if (quantizes) {
    params.x = a.x;
  } else {
    error = encode(params.x_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.x, a.m, a.k, a.x_stride,
                   division.tile_tokens / (plan.pairs ? 2 : 1));
  }
  const bool two_bytes = a.y_type == Element::kBFloat16 || a.y_type == Element::kFloat16;
  if (error == cudaSuccess && kernels->stores_by_tma && two_bytes && params.rows_are_vectors())
    error = encode(params.y_map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.y, a.m, a.n, a.y_stride * 2,
                   plan.tile.store_tokens());
  if (error != cudaSuccess)
    return error;
  return launch(params, division.workers, stream);
}

}  // namespace liquidgemm
