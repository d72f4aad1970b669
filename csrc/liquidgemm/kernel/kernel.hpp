// The GEMM kernel: composition only. Each role is described in its own header.
//
// clang-format off
//   role                      threads              waits for               arrives at
//   ------------------------  -------------------  ----------------------  -----------------------------
//   weight loader             1, last group        empty[slot]; once,      full[slot]: 1 and its bytes, or 1
//   load/weights.hpp                               before more than the    there, 1 and its bytes at
//                                                  prefetch: full[0], or   ahead[stage]
//                                                  read
//   token loader              1, last group        previous kernel,        full[slot]: 1 and its bytes
//   load/tokens_tma.hpp                            empty[slot]; in a pair
//                                                  at its end every slot's
//   consumer warp-groups      panels * k_groups    ahead[stage],           empty[slot]: 1 per warp that read
//   consumer.hpp, ahead.hpp                        full[slot]              it; in a pair the peer's too
//   if they quantize          all consumers        previous kernel;        read: 1, thread 0
//   load/tokens_quantized.hpp                      panel barrier, twice
//   epilogue                  k_groups groups      panel barrier           received (bytes) and drained
//   epilogue.hpp              per panel            split K: drained,       (1 per warp, if a tile follows),
//                                                  received                cluster-wide
//                                                  pair: multiplied,       multiplied (1 per warp) and
//                                                  received                received (bytes) of the peer
//   resolver, if experts'  1 warp, last group      taken[entry]            resolved[entry]: 1
//   schedule/grouped.hpp
//
//   protocol.hpp has the same by barrier, with the counts.
//
//   If the consumers quantize, the token loader only lets the next kernel start, and full[slot] has one
//   arrival less. In a pair each CTA fills half of the other's ring, so empty[slot] counts the warps of
//   both. For a tile that they share along K each fills its own ring, and its warps arrive twice.
//
//   weight loader    | W W W W ...                  | W as slots become free, across tiles
//   token loader     | wait for the previous kernel | X X X X ... | X as slots become free, across tiles
//   consumer         |   | ahead: LDS dequantize    |   | full: MMA | full: LDS dequantize MMA | .. | epilogue |
//
//   If weights arrive well before the activations, consumers dequantize the first stages early and hold
//   them in registers (ahead.hpp): ahead[stage] then counts their bytes, not full[slot].
// clang-format on
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/kernel/ahead.hpp"
#include "liquidgemm/kernel/consumer.hpp"
#include "liquidgemm/kernel/epilogue.hpp"
#include "liquidgemm/kernel/load/tokens.hpp"
#include "liquidgemm/kernel/load/weights.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile, class Work>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    gemm_kernel(const __grid_constant__ KernelParams<Work> params) {
  extern __shared__ uint8_t shared_bytes[];
  // Dynamic shared memory starts at offset 0 of the CTA's window: aligned as SharedStorage wants,
  // as long as no kernel declares static shared memory.
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(shared_bytes);

  const int warp = cutlass::canonical_warp_idx_sync();
  const int producer_warp =
      warp -
      4 * Tile::kConsumerGroups;  // of the last group; two are used, three if work is resolved
  const bool pairs = Tile::kPairs && params.work.cluster.pairs;
  const bool cluster = params.work.cluster.log2_split > 0 || pairs;

  using Scheduler = typename Work::template Scheduler<Tile>;
  if (producer_warp == 0 && cute::elect_one_sync()) {
    Tokens<Tile>::prefetch_descriptor(params.maps.tokens);
    if (Tile::kStoresByTma)
      cute::prefetch_tma_descriptor(&params.maps.output);
    if constexpr (Work::kScheduleBytes > 0)
      Scheduler::init();
    shared.barriers.init(params.work.cluster, pairs);
  }
  __syncwarp();
  // The CTAs of a cluster address each other's barriers. All warps wait for the cluster but the
  // weight loader's: it needs its own CTA's barriers alone, and waiting would delay the first
  // loads.
  if (cluster)
    cute::cluster_arrive_relaxed();
  __syncthreads();
  if (cluster && producer_warp != 0)
    cute::cluster_wait();

  if (producer_warp >= 0) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kProducerRegisters>();
    // Recomputed if one more role follows: kept through the loaders, the index is spilled.
    const auto is_warp = [=](int index) {
      return Work::kScheduleBytes > 0
                 ? static_cast<int>(threadIdx.x / 32) == 4 * Tile::kConsumerGroups + index
                 : producer_warp == index;
    };
    if constexpr (Work::kScheduleBytes > 0) {
      if (is_warp(2))
        Scheduler::resolve(params.sizes, params.work);
    }
    if (is_warp(0) && cute::elect_one_sync()) {
      const WeightLoader<Tile> weights(params.sizes, params.weights, params.prefetch, shared);
      weights.load(params.work);
    }
    if (is_warp(1) && cute::elect_one_sync())
      Tokens<Tile>::load(params.maps.tokens, params.sizes, params.work, shared);
    __syncwarp();
    if (cluster && is_warp(0))
      cute::cluster_wait();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tile::kConsumerRegisters>();
    // Recomputed: keeping the warp-group index live from the prologue spills it.
    const int group = cutlass::canonical_warp_group_idx();
    const int panel = group / Tile::kKGroups;
    const int k_group = group % Tile::kKGroups;
    const Consumer<Tile> consumer(params.sizes, shared, panel, k_group);
    typename Work::template Epilogue<Tile> epilogue(params.sizes, params.output, params.maps.output,
                                                    params.work.cluster, shared, panel);
    const Ahead<Tile> ahead(params.prefetch, shared, k_group);
    auto operands_ahead = Ahead<Tile>::make_operands();
    if constexpr (Tile::kStagesAhead > 0)
      ahead.dequantize(operands_ahead);
    wait_on_dependent_grids();  // x_scale is read and y written below
    Scheduler scheduler(params.sizes, params.work);
    if constexpr (Tile::kQuantizes) {
      // A CTA has the same part of K of all of its tiles.
      const WorkItem work = scheduler.work();
      QuantizedTokens<Tile>::quantize(params.sizes, params.tokens, shared, work.begin, work.end);
    }
    auto acc = Consumer<Tile>::make_accumulator();
    int stages_multiplied = 0;  // of the present tile, by all groups
    if constexpr (Tile::kStagesAhead > 0) {
      const WorkItem work = scheduler.work();
      epilogue.prefetch(work, scheduler.place(work));
      cute::clear(acc);
      ahead.multiply(params.sizes, consumer, operands_ahead, acc);
      stages_multiplied = params.prefetch.stages_ahead * Tile::kKGroups;
    }
    CUTE_NO_UNROLL
    for (; scheduler.valid(); scheduler.advance()) {
      const WorkItem work = scheduler.work();
      if (Tile::kStagesAhead == 0 || scheduler.item() > 0) {
        epilogue.prefetch(work, scheduler.place(work));
        cute::clear(acc);
      }
      // The CTAs of a pair fill each other's rings, but each its own for a tile that they share.
      const int pair_rank = pairs ? cta_rank() ^ !work.split : -1;
      consumer.multiply(work.stages_done, stages_multiplied, work.end - work.begin, pair_rank, acc);
      stages_multiplied = 0;
      epilogue.store(scheduler, acc, k_group);
    }
    epilogue.finish();
  }
}

}  // namespace liquidgemm
