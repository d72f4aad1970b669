// The GEMM kernel: composition only. Each role is described in its own header.
//
//   role                     threads            waits for                   arrives at
//   producer (last group)    1 of 128           empty[slot]                 full[slot]: 1 + bytes
//   of the stage consumer warp-groups     panels * k_groups  full[slot] empty[slot]: 1 per warp
//   that read it
//     its epilogue           all of a panel     named barrier of the panel; with split K: staged,
//     drained (cluster)
//
//   producer   | W W W W .. | wait for the previous kernel | X X X X .. | W+X  W+X  W+X ...   the
//   next tile's stages too consumer   | ...... full[0] | LDS dequant MMA | LDS dequant MMA | ... |
//   epilogue |  next tile
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/kernel/consumer.hpp"
#include "liquidgemm/kernel/epilogue.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/producer.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ uint8_t shared_bytes[];
  // The runtime aligns dynamic shared memory to 1024 bytes when nothing static precedes it; the
  // launch asserts the size.
  auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(shared_bytes);

  const int warp = cutlass::canonical_warp_idx_sync();
  const int group = warp / 4;
  const bool is_producer = warp == Tile::kConsumerGroups * 4;  // the rest of its group idles
  const bool split = params.split_k > 1;
  const int cta_rank = split ? cute::block_rank_in_cluster() : 0;
  TileScheduler scheduler(params, blockIdx.x / params.split_k, gridDim.x / params.split_k);
  Producer<Tile> producer(params, shared, scheduler, cta_rank);

  if (is_producer && cute::elect_one_sync()) {
    cute::prefetch_tma_descriptor(&params.x_map);
    using cutlass::arch::ClusterBarrier;
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      ClusterBarrier::init(&shared.full[slot], 1);
      ClusterBarrier::init(&shared.empty[slot], Tile::kPanels * kWarpGroupThreads / 32);
    }
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ClusterBarrier::init(&shared.staged[panel], Epilogue<Tile>::arrivals(params.split_k));
      ClusterBarrier::init(&shared.drained[panel], Epilogue<Tile>::arrivals(params.split_k));
    }
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
    producer.request_first_weights();
  }
  __syncwarp();
  if (split) {
    cute::cluster_arrive();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }

  if (group == Tile::kConsumerGroups) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kProducerRegisters>();
    if (is_producer && cute::elect_one_sync())
      producer.run();
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tile::kConsumerRegisters>();
    const int panel = group / Tile::kKGroups;
    const int k_group = group % Tile::kKGroups;
    const SlabRange slabs = slab_range<Tile>(params, cta_rank);
    Epilogue<Tile> epilogue(params, shared, cta_rank, panel,
                            threadIdx.x - panel * Tile::kKGroups * kWarpGroupThreads);
    RingState<Tile> ring;
    cutlass::arch::wait_on_dependent_grids();  // x_scale is read and y written below
    for (; scheduler.valid(); scheduler.advance()) {
      epilogue.prefetch(scheduler.coord());
      auto acc = Consumer<Tile>::make_accumulator();
      cute::clear(acc);
      Consumer<Tile>::multiply(shared, ring, slabs.end - slabs.begin, panel, k_group, acc);
      epilogue.store(acc, k_group);
    }
  }
  if (split) {  // a peer may still read this CTA's staged sums or arrive at its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
}

}  // namespace liquidgemm
