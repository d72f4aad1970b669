// The kernel of ablation.cu: one skeleton, four ways from packed weights to products.
//
//   role                  threads            waits for             arrives at
//   weight producer       1                  empty                 full: 1 and its bytes
//   token producer        1                  previous kernel,      full: 1 and its bytes
//                                            empty
//   dequantizer (excp)    1 group per MMA    full, taken           empty, ready: 1 per warp
//                         group
//   MMA warp-groups       panels * k_groups  full (excp: ready     empty (excp: and taken): 1 per
//                                            too)                  warp
#pragma once

#include "ablation_main_loop.hpp"

namespace ablation {

// Adds up the k groups of a panel through shared memory; the first of them scales and stores.
template <class C, class Accumulator>
CUTE_DEVICE void store(
    Params const& params, Shared<C>& shared, int tile, int panel, int k_group, Accumulator& acc) {
  using namespace cute;
  const int thread = threadIdx.x % kWarpGroupThreads;
  if constexpr (C::kKGroups > 1) {
    if (k_group > 0) {
      CUTE_UNROLL
      for (int i = 0; i < size(acc); ++i)
        shared.staging[k_group - 1][i][thread] = acc(i);
    }
    meet(C::kMmaThreads, kStaged);
    if (k_group == 0) {
      CUTE_UNROLL
      for (int i = 0; i < size(acc); ++i) {
        CUTE_UNROLL
        for (int group = 0; group < C::kKGroups - 1; ++group)
          acc(i) += shared.staging[group][i][thread];
      }
    }
    meet(C::kMmaThreads, kUnstaged);
    if (k_group > 0)
      return;
  }
  const int first_channel = (tile / params.token_tiles * C::kPanels + panel) * kBlockRows;
  const int first_token = tile % params.token_tiles * C::kTokens;
  const int64_t y_stride = params.token_tiles * C::kTokens;
  auto thread_mma = typename C::Mma{}.get_thread_slice(thread);
  Tensor at = thread_mma.partition_C(make_identity_tensor(Shape<_64, Int<C::kTokens>>{}));
  CUTE_UNROLL
  for (int i = 0; i < size(acc); i += 2) {  // two neighbouring tokens
    const int channel = first_channel + get<0>(at(i));
    const int token = first_token + get<1>(at(i));
    const float scale = params.weight_scale[channel];
    const float2 x_scale = *reinterpret_cast<float2 const*>(params.x_scale + token);
    const float low = __fmul_rn(__fmul_rn(static_cast<float>(acc(i)), x_scale.x), scale);
    const float high = __fmul_rn(__fmul_rn(static_cast<float>(acc(i + 1)), x_scale.y), scale);
    *reinterpret_cast<__nv_bfloat162*>(params.y + channel * y_stride + token) =
        __floats2bfloat162_rn(low, high);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) gemm_kernel(const Params params) {
  static_assert(sizeof(Shared<C>) <= C::kSharedBytes);
  extern __shared__ uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<C>*>(shared_bytes);
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpGroupThreads, 0);

  if (threadIdx.x == 0) {
    using cutlass::arch::ClusterBarrier;
    constexpr int kWarps = kWarpGroupThreads / 32;
    for (int slot = 0; slot < C::kStages; ++slot) {
      ClusterBarrier::init(&shared.full[slot], 2);
      ClusterBarrier::init(&shared.empty[slot], C::kPanels * kWarps * (C::kSeparate ? 2 : 1));
    }
    for (int worker = 0; worker < C::kMmaGroups; ++worker) {
      for (int buffer = 0; buffer < C::kDecodedBuffers; ++buffer) {
        ClusterBarrier::init(&shared.ready[worker][buffer], kWarps);
        ClusterBarrier::init(&shared.taken[worker][buffer], kWarps);
      }
    }
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();

  const int worker = group % C::kMmaGroups;
  const int panel = worker / C::kKGroups;
  const int k_group = worker % C::kKGroups;
  if (group == C::kGroups) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    const int thread = threadIdx.x % kWarpGroupThreads;
    if (thread == 0)
      load_weights<C>(params, shared);
    if (thread == 32)
      load_tokens<C>(params, shared);
  } else if (C::kSeparate && group >= C::kMmaGroups) {
    cutlass::arch::warpgroup_reg_dealloc<C::kDequantRegisters>();
    if constexpr (C::kSeparate)
      dequantize_for<C>(params, shared, worker, panel, k_group);
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kMmaRegisters>();
    wait_for_previous_kernel();  // y is written below
    const MainLoop<C> loop{shared, worker, panel, k_group};
    int stages_done = 0;
    CUTE_NO_UNROLL
    for (int tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
      auto acc = cute::partition_fragment_C(typename C::Mma{},
                                            cute::Shape<cute::_64, cute::Int<C::kTokens>>{});
      cute::clear(acc);
      if constexpr (C::kVariant == Variant::kImFP)
        loop.overlapped(stages_done, params.slabs, acc);
      else if constexpr (C::kSeparate)
        loop.from_shared(stages_done, params.slabs, acc);
      else
        loop.in_turn(stages_done, params.slabs, acc);
      store<C>(params, shared, tile, panel, k_group, acc);
      stages_done += params.slabs;
    }
  }
}

}  // namespace ablation
