// Which rows each expert gets: a stable counting sort of the slots, by one CTA, or for many slots
// by a cluster of them.
//
// Each warp of the cluster has a contiguous part of the slots. It counts them by expert; a scan
// over experts, and in each over warps, says where the warp's first slot of every expert goes; then
// the warp walks its part again, 32 slots at a time in order. So equal ids keep their order, and no
// atomics decide.
//
//   count       counts[warp][expert], by match.any among 32 slots
//   share       totals[expert] of a CTA, which the others of the cluster read
//   place       counts[warp][expert] = first row; offsets
//   distribute  row = counts[warp][expert] + rank among the 32

#include <algorithm>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/moe.hpp"

namespace liquidgemm {
namespace {

constexpr int kMostWarps = 32;
constexpr int kSharedInts = 48 << 10;   // some 192 of 227 KiB
constexpr int kMostCtas = 8;            // of a cluster
constexpr int64_t kSlotsOfACta = 1024;  // one for each thread
constexpr uint32_t kAllLanes = 0xffffffffu;

static_assert(kMostScheduledExperts <= kSharedInts);

// Calls visit(slot, expert) for a warp's slots, 32 at a time in order; expert is -1 if there is
// none. Several loads are in flight at a time.
template <class Id, class Visit>
__device__ void for_each_slot(
    Id const* ids, int64_t begin, int64_t end, int experts, Visit const& visit) {
  constexpr int kBatch = 8;
#pragma unroll 1
  for (int64_t first = begin + threadIdx.x % 32; first - threadIdx.x % 32 < end;
       first += 32 * kBatch) {
    Id id[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      id[i] = first + i * 32 < end ? ids[first + i * 32] : Id{-1};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t slot = first + i * 32;
      if (slot - threadIdx.x % 32 < end)  // for the whole warp
        visit(slot, id[i] >= 0 && id[i] < experts ? static_cast<int>(id[i]) : -1);
    }
  }
}

__device__ int inclusive_sum(int value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, distance);
    value += threadIdx.x % 32 >= distance ? other : 0;
  }
  return value;
}

// The sum over the threads before this one, all warps of the CTA taking part.
__device__ int exclusive_sum_of_cta(int value, int* of_warp) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int inclusive = inclusive_sum(value);
  if (lane == 31)
    of_warp[warp] = inclusive;
  __syncthreads();
  const int sums = inclusive_sum(lane < warps ? of_warp[lane] : 0);
  const int before = __shfl_sync(kAllLanes, sums, (warp + 31) % 32);
  return (warp > 0 ? before : 0) + inclusive - value;
}

template <class Id>
__global__ void __launch_bounds__(kMostWarps * 32) schedule_kernel(Id const* ids,
                                                                   int64_t slots,
                                                                   int experts,
                                                                   int32_t* offsets,
                                                                   int32_t* row_of_slot,
                                                                   int32_t* slot_of_row) {
  extern __shared__ int counts[];  // [warps][experts], and in a cluster totals, [experts]
  __shared__ int of_warp[kMostWarps];
  __shared__ int rows;
  launch_dependent_grids();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int cta = cta_rank(), ctas = gridDim.x;
  int* const totals = counts + warps * experts;
  int* const mine = counts + warp * experts;
  for (int e = lane; e < experts; e += 32)
    mine[e] = 0;
  __syncwarp();
  wait_on_dependent_grids();

  const int64_t lanes = int64_t(ctas) * blockDim.x;
  const int64_t part = (slots + lanes - 1) / lanes * 32;
  const int64_t begin = (int64_t(cta) * warps + warp) * part, end = min(begin + part, slots);
  for_each_slot(ids, begin, end, experts, [&](int64_t, int expert) {
    const uint32_t same = __match_any_sync(kAllLanes, expert);
    if (expert >= 0 && lane == __ffs(same) - 1)
      mine[expert] += __popc(same);
    __syncwarp();
  });
  __syncthreads();

  // Threads have contiguous experts, so that the sum over threads is one over experts.
  const int run = (experts + blockDim.x - 1) / blockDim.x;
  const int first_expert = min(static_cast<int>(threadIdx.x) * run, experts);
  const int last_expert = min(first_expert + run, experts);
  const auto total_of_cta = [&](int e) {
    int total = 0;
    for (int w = 0; w < warps; ++w)
      total += counts[w * experts + e];
    return total;
  };
  if (ctas > 1) {
    for (int e = first_expert; e < last_expert; ++e)
      totals[e] = total_of_cta(e);
    __syncwarp();
    cute::cluster_arrive();
    cute::cluster_wait();
  }
  // Of an expert: the slots of the CTAs before this one, and of all.
  struct Slots {
    int before, all;
  };
  const auto slots_of = [&](int e) {
    if (ctas == 1)
      return Slots{0, total_of_cta(e)};
    Slots result{0, 0};
    for (int i = 0; i < ctas; ++i) {
      if (i == cta)
        result.before = result.all;
      result.all += load_at_cluster(peer_address(&totals[e], i));
    }
    return result;
  };
  int of_thread = 0;
  for (int e = first_expert; e < last_expert; ++e)
    of_thread += slots_of(e).all;
  int first_row = exclusive_sum_of_cta(of_thread, of_warp);
  for (int e = first_expert; e < last_expert; ++e) {
    const Slots of_expert = slots_of(e);
    if (cta == 0)
      offsets[e] = first_row;
    int row = first_row + of_expert.before;
    first_row += of_expert.all;
    for (int w = 0; w < warps; ++w) {
      const int count = counts[w * experts + e];
      counts[w * experts + e] = row;
      row += count;
    }
  }
  if (first_expert < experts && last_expert == experts) {
    if (cta == 0)
      offsets[experts] = first_row;
    rows = first_row;
  }
  __syncthreads();
  if (ctas > 1)
    cute::cluster_arrive();  // the others' totals have been read

  for_each_slot(ids, begin, end, experts, [&](int64_t slot, int expert) {
    const uint32_t same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int to = expert >= 0 ? mine[expert] + rank : -1;
    __syncwarp();
    if (expert >= 0 && rank == 0)
      mine[expert] += __popc(same);
    __syncwarp();
    if (slot < end)
      row_of_slot[slot] = to;
    if (to >= 0)
      slot_of_row[to] = static_cast<int32_t>(slot);
  });
  for (int64_t r = rows + int64_t(cta) * blockDim.x + threadIdx.x; r < slots; r += lanes)
    slot_of_row[r] = -1;
  __syncwarp();
  if (ctas > 1)
    cute::cluster_wait();  // a CTA that is gone has no totals
}

template <class Id>
cudaError_t launch(MoeScheduleArguments const& a, cudaStream_t stream) {
  int ctas = 1;
  while (ctas < kMostCtas && ctas * kSlotsOfACta < a.slots && 2 * a.experts <= kSharedInts)
    ctas *= 2;
  const int arrays = kSharedInts / a.experts - (ctas > 1);
  const int64_t warps = std::clamp<int64_t>(ceil_div(a.slots, 32), 1, std::min(kMostWarps, arrays));
  const int shared_bytes = static_cast<int>((warps + (ctas > 1)) * a.experts * sizeof(int));
  auto* const kernel = schedule_kernel<Id>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedInts * sizeof(int));
  if (error != cudaSuccess)
    return error;
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(ctas)),
                          .threads = static_cast<int>(warps * 32),
                          .shared_bytes = shared_bytes,
                          .cluster = ctas};
  return launch_early(kernel, shape, stream, static_cast<Id const*>(a.topk_ids), a.slots, a.experts,
                      a.offsets, a.row_of_slot, a.slot_of_row);
}

}  // namespace

cudaError_t moe_schedule(MoeScheduleArguments const& a, cudaStream_t stream) {
  if (a.experts < 1 || a.experts > kMostScheduledExperts)
    return cudaErrorInvalidValue;
  return a.ids_are_64_bits ? launch<int64_t>(a, stream) : launch<int32_t>(a, stream);
}

}  // namespace liquidgemm
