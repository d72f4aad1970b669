// The GEMM kernel: composition only. Each role is described in its own header.
//
// clang-format off
//   role                      threads              waits for               arrives at
//   ------------------------  -------------------  ----------------------  -----------------------------
//   weight producer           1, last group        empty[slot]             full[slot]: 1 and its bytes, or 1
//                                                                          and its bytes at ahead[stage]
//   token producer            1, last group        previous kernel, empty  full[slot]: 1 and its bytes
//   consumer warp-groups      panels * k_groups    ahead[stage],           empty[slot]: 1 per warp that read it
//                                                  full[slot]
//   epilogue (all consumers   k_groups groups      named barrier of the    with split K: received (by bytes) and
//   of a panel)               per panel            panel                   drained (1 per warp, if a tile
//                                                                          follows), cluster-wide
//                                                                          pairs: multiplied (1 per warp) and
//                                                                          received (by bytes) of the other CTA
//
//   Where the kernel quantizes, the consumers do so before their first tile (quantized_tokens.hpp); the
//   token producer only lets the next kernel start, and full[slot] has one arrival less.
//
//   In a pair, empty[slot] is that of both CTAs: each fills half of the other's ring. For a tile that
//   they share along K each fills its own, and its warps arrive twice.
//
//   weight producer  | W W W W ...                  | W as slots become free, across tiles
//   token producer   | wait for the previous kernel | X X X X ... | X as slots become free, across tiles
//   consumer         |   | ahead: LDS dequantize    |   | full: MMA | full: LDS dequantize MMA | .. | epilogue |
//
//   Where weights are there long before tokens, a few stages of them wait as operands in registers
//   (consumer.hpp): ahead[stage] then counts them, not full[slot].
// clang-format on
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/kernel/consumer.hpp"
#include "liquidgemm/kernel/epilogue.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/partial_sums.hpp"
#include "liquidgemm/kernel/producer.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    gemm_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ uint8_t shared_bytes[];
  // Dynamic shared memory starts at offset 0 of the CTA's window: aligned as SharedStorage wants,
  // as long as no kernel declares static shared memory.
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(shared_bytes);

  const int warp = cutlass::canonical_warp_idx_sync();
  const int producer_warp = warp - 4 * Tile::kConsumerGroups;  // of the last group; two are used
  const bool pairs = Tile::kPairs && params.pairs;
  const bool cluster = params.log2_split > 0 || pairs;

  if (producer_warp == 0 && cute::elect_one_sync()) {
    if (!Tile::kQuantizes)
      cute::prefetch_tma_descriptor(&params.x_map);
    if (Tile::kStoresByTma)
      cute::prefetch_tma_descriptor(&params.y_map);
    using cutlass::arch::ClusterBarrier;
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      ClusterBarrier::init(&shared.full[slot], Producer<Tile>::kThreads);
      ClusterBarrier::init(&shared.empty[slot], Tile::kPanels * kWarpGroupThreads / 32 *
                                                    kReleasesPerWarp * (pairs ? 2 : 1));
    }
    for (int stage = 0; stage < Tile::kStagesAhead * Tile::kKGroups; ++stage)
      ClusterBarrier::init(&shared.ahead[stage], 1);
    PartialSums<Tile>::init_barriers(shared, params.split_k());
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
  }
  __syncwarp();
  // The CTAs of a cluster address each other's barriers. All warps wait for them but the weight
  // producer's, which needs only its own CTA's and has no time to lose.
  if (cluster)
    cute::cluster_arrive_relaxed();
  __syncthreads();
  if (cluster && producer_warp != 0)
    cute::cluster_wait();

  if (producer_warp >= 0) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kProducerRegisters>();
    const Producer<Tile> producer(params, shared);
    if (producer_warp == 0 && cute::elect_one_sync())
      producer.load_weights();
    if (producer_warp == 1 && cute::elect_one_sync())
      producer.load_tokens();
    __syncwarp();
    if (cluster && producer_warp == 0)
      cute::cluster_wait();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tile::kConsumerRegisters>();
    // Asked again: held in a register up to here, it would be spilled.
    const int group = cutlass::canonical_warp_group_idx();
    const int panel = group / Tile::kKGroups;
    const int k_group = group % Tile::kKGroups;
    Epilogue<Tile> epilogue(params, shared, panel);
    auto operands_ahead = Consumer<Tile>::make_operands_ahead();
    if constexpr (Tile::kStagesAhead > 0)
      Consumer<Tile>::dequantize_ahead(params, shared, k_group, operands_ahead);
    cutlass::arch::wait_on_dependent_grids();  // x_scale is read and y written below
    Scheduler<Tile> scheduler(params);
    if constexpr (Tile::kQuantizes) {
      // A CTA's share of K is the same for all of its tiles.
      const WorkItem work = scheduler.work();
      QuantizedTokens<Tile>::quantize(params, shared, work.begin, work.end);
    }
    auto acc = Consumer<Tile>::make_accumulator();
    int stages_multiplied = 0;  // of the present tile, by all groups
    if constexpr (Tile::kStagesAhead > 0) {
      epilogue.prefetch(scheduler.work());
      cute::clear(acc);
      Consumer<Tile>::multiply_ahead(params, shared, k_group, operands_ahead, acc);
      stages_multiplied = params.stages_ahead * Tile::kKGroups;
    }
    CUTE_NO_UNROLL
    for (; scheduler.valid(); scheduler.advance()) {
      const WorkItem work = scheduler.work();
      if (Tile::kStagesAhead == 0 || scheduler.item() > 0) {
        epilogue.prefetch(work);
        cute::clear(acc);
      }
      // The CTAs of a pair fill each other's rings, but each its own for a tile that they share.
      const int pair_rank = pairs ? Scheduler<Tile>::rank() ^ !work.split : -1;
      Consumer<Tile>::multiply(params, shared, work.stages_done, stages_multiplied,
                               work.end - work.begin, panel, k_group, pair_rank, acc);
      stages_multiplied = 0;
      epilogue.store(scheduler, acc, k_group);
    }
    epilogue.finish();
  }
}

}  // namespace liquidgemm
