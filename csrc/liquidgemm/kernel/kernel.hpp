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
  const bool in_cluster = params.split_k * params.multicast > 1;
  const Producer<Tile> producer(params, shared);

  if (is_producer && cute::elect_one_sync()) {
    cute::prefetch_tma_descriptor(&params.x_map);
    using cutlass::arch::ClusterBarrier;
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      ClusterBarrier::init(&shared.full[slot], 1);
      ClusterBarrier::init(&shared.empty[slot],
                           Tile::kPanels * params.multicast * kWarpGroupThreads / 32);
    }
    Epilogue<Tile>::init_barriers(shared, params.split_k);
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
    producer.request_first_weights();
  }
  __syncwarp();
  // Peers' barriers are addressed later, by the first tokens or the first epilogue: wait there.
  if (in_cluster)
    cute::cluster_arrive_relaxed();
  __syncthreads();

  if (group == Tile::kConsumerGroups) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kProducerRegisters>();
    if (in_cluster)
      cute::cluster_wait();
    if (is_producer && cute::elect_one_sync())
      producer.run();
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tile::kConsumerRegisters>();
    const int panel = group / Tile::kKGroups;
    const int k_group = group % Tile::kKGroups;
    const SlabRange range = slab_range<Tile>(params);
    const int slabs = range.end - range.begin;
    Epilogue<Tile> epilogue(params, shared, panel);
    cutlass::arch::wait_on_dependent_grids();  // x_scale is read and y written below
    CUTE_NO_UNROLL
    for (TileScheduler scheduler(params); scheduler.valid(); scheduler.advance()) {
      epilogue.prefetch(scheduler.coord());
      auto acc = Consumer<Tile>::make_accumulator();
      cute::clear(acc);
      Consumer<Tile>::multiply(shared, scheduler.iteration() * slabs, slabs, panel, k_group,
                               params.multicast, acc);
      if (in_cluster && scheduler.iteration() == 0)
        cute::cluster_wait();
      epilogue.store(scheduler, acc, k_group);
    }
    epilogue.finish_cluster();
  }
}

}  // namespace liquidgemm
