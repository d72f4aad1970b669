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

#include <cuda_bf16.h>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/formats/liquidquant.hpp"

namespace ablation {

using namespace liquidgemm;

enum class Variant { kBaseline, kLiquidQuant, kExCP, kImFP };
constexpr char const* kVariantNames[] = {"baseline", "lqq", "excp", "imfp"};

template <int Tokens, Variant variant>
struct Config {
  static constexpr int kTokens = Tokens;
  static constexpr Variant kVariant = variant;
  static constexpr bool kSeparate = variant == Variant::kExCP;

  // Few tokens: many CTAs of one panel each. Many tokens: two panels share them. More than 128 per
  // tile are beyond excp: with dequantizers beside them, MMA warps get no 128 accumulators a
  // thread.
  static_assert(Tokens <= 128);
  static constexpr int kPanels = Tokens >= 128 ? 2 : 1;
  static constexpr int kKGroups = kPanels == 2 ? 1 : kSeparate ? 2 : 4;
  static constexpr int kMmaGroups = kPanels * kKGroups;
  static constexpr int kGroups = kSeparate ? 2 * kMmaGroups : kMmaGroups;
  static constexpr int kMmaThreads = kMmaGroups * kWarpGroupThreads;
  static constexpr int kThreads = (kGroups + 1) * kWarpGroupThreads;  // and the producers' group

  // By setmaxnreg; see Tile in csrc/liquidgemm/kernel/tile.hpp.
  static constexpr int kLaunchRegisters = 512 / (kGroups + 1) / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kDequantRegisters = 64;
  static constexpr int kMmaRegisters = (kLaunchRegisters * (kGroups + 1) - kProducerRegisters -
                                        (kSeparate ? kMmaGroups * kDequantRegisters : 0)) /
                                       kMmaGroups / 8 * 8;

  static constexpr int kStageBlocks = Tokens <= 16 ? 4 : 2;
  static constexpr int kStageK = kStageBlocks * kBlockK;
  static constexpr int kPanelStageBytes = kStageBlocks * LiquidQuant::kBlockBytes;
  static constexpr int kStageTokenBytes = Tokens * kStageK;
  static constexpr int kDecodedBuffers = 2;  // per MMA group
  static constexpr int kDecodedBytes =
      kSeparate ? kMmaGroups * kDecodedBuffers * kBlockRows * kStageK : 0;
  static constexpr int kStagingBytes = (kKGroups - 1) * kBlockRows * Tokens * 4;
  static constexpr int kSharedBytes = 227 * 1024;
  static constexpr int kStagesThatFit = (kSharedBytes - kDecodedBytes - kStagingBytes - 2048) /
                                        (kPanels * kPanelStageBytes + kStageTokenBytes);
  // A slot always belongs to the same k group.
  static constexpr int kStages = kStagesThatFit / kKGroups * kKGroups;
  static_assert(kStages >= 2 * kKGroups);

  using TileMNK = cute::Shape<cute::_64, cute::Int<Tokens>, cute::Int<kMmaK>>;
  static CUTE_HOST_DEVICE auto atom() {
    if constexpr (kSeparate)
      return cute::SM90::GMMA::ss_op_selector<int8_t, int8_t, int32_t, TileMNK>();
    else
      return cute::SM90::GMMA::rs_op_selector<int8_t, int8_t, int32_t, TileMNK>();
  }
  using Mma = decltype(cute::make_tiled_mma(atom()));
  using Atom = cute::GMMA::Layout_K_SW128_Atom<int8_t>;
  using TokenLayout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::Int<Tokens>, cute::Int<kStageK>, cute::Int<kStages>>{}));
  using DecodedLayout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::_64, cute::Int<kStageK>, cute::Int<kDecodedBuffers>>{}));
};

struct Params {
  uint8_t const* weight;      // packed
  int8_t const* tokens;       // [token_tiles][slabs][kStageTokenBytes], as a stage wants them
  float const* x_scale;       // [tokens]
  float const* weight_scale;  // [n]
  __nv_bfloat16* y;           // [n, tokens]
  int tiles;                  // of kPanels * 64 channels and kTokens tokens; tokens vary fastest
  int token_tiles;
  int slabs;  // of kStageK
};

template <class C>
struct alignas(1024) Shared {
  alignas(1024) int8_t tokens[C::kStages][C::kStageTokenBytes];
  alignas(1024) int8_t decoded[C::kSeparate ? C::kMmaGroups : 1]
                              [C::kSeparate ? C::kDecodedBuffers * kBlockRows * C::kStageK : 1024];
  alignas(16) uint8_t weights[C::kStages][C::kPanels][C::kPanelStageBytes];
  int32_t staging[C::kKGroups > 1 ? C::kKGroups - 1 : 1][C::kKGroups > 1 ? C::kTokens / 2 : 1]
                 [kWarpGroupThreads];
  alignas(8) uint64_t full[C::kStages];
  uint64_t empty[C::kStages];
  uint64_t ready[C::kMmaGroups][C::kDecodedBuffers];
  uint64_t taken[C::kMmaGroups][C::kDecodedBuffers];
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Both do nothing in an ordinary launch.
CUTE_DEVICE void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
CUTE_DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

CUTE_DEVICE void meet(int threads, int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
enum NamedBarrier { kDequantized = 1, kMultiplied, kStaged, kUnstaged };

// One lane speaks for its warp. Without a branch: ptxas serializes wgmmas around a divergent one.
CUTE_DEVICE void warp_arrive(uint64_t* barrier, bool condition = true) {
  __syncwarp();
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
      "r"(static_cast<int>(condition && threadIdx.x % 32 == 0))
      : "memory");
}

// The slabs of one worker: every kKGroups-th stage, counted from the kernel's first.
template <class C>
struct Cursor {
  int number, slab;

  CUTE_DEVICE Cursor(int stages_done, int k_group)
      : slab((k_group + C::kKGroups - stages_done % C::kKGroups) % C::kKGroups) {
    number = stages_done + slab;
  }
  CUTE_DEVICE void advance() {
    number += C::kKGroups;
    slab += C::kKGroups;
  }
  CUTE_DEVICE int slot() const { return number % C::kStages; }
  CUTE_DEVICE uint32_t phase() const { return number / C::kStages % 2; }
  CUTE_DEVICE int slot_before() const { return (number + C::kStages - C::kKGroups) % C::kStages; }
  // Of the decoded buffers of an MMA group, which serve its slabs in turn.
  CUTE_DEVICE int use() const { return number / C::kKGroups; }
  CUTE_DEVICE int buffer() const { return use() % C::kDecodedBuffers; }
  CUTE_DEVICE uint32_t buffer_phase() const { return use() / C::kDecodedBuffers % 2; }
};

// One block of this thread's weights: 8 A registers, those of k step 0 first.
template <class C>
CUTE_DEVICE void dequantize(uint8_t const* block, int thread, uint32_t (&out)[8]) {
  const uint4 codes = reinterpret_cast<uint4 const*>(block)[thread];
  const uint32_t params = reinterpret_cast<uint32_t const*>(
      block + LiquidQuant::kCodeBytes)[LiquidQuant::param_word(thread)];
  const uint32_t step[2] = {__byte_perm(params, 0, 0x4440), __byte_perm(params, 0, 0x4442)};
  const uint32_t offsets[2] = {__byte_perm(params, 0, 0x1111), __byte_perm(params, 0, 0x3333)};
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  CUTE_UNROLL
  for (int r = 0; r < 8; ++r) {
    const uint32_t four = (r < 4 ? words[r] : words[r - 4] >> 4) & 0x0f0f0f0fu;
    if constexpr (C::kVariant == Variant::kBaseline) {
      // QServe keeps the offset signed and adds it byte by byte: a - 128 instead of a.
      out[r] = __vadd4(four * step[r % 2], offsets[r % 2] ^ 0x80808080u);
    } else {
      out[r] = LiquidQuant::decode4(four, step[r % 2], offsets[r % 2]);
    }
  }
}

template <class C>
CUTE_DEVICE void load_weights(Params const& params, Shared<C>& shared) {
  const int64_t panel_bytes = int64_t(params.slabs) * C::kPanelStageBytes;
  int number = 0;
  for (int tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    uint8_t const* from =
        params.weight + int64_t(tile / params.token_tiles) * C::kPanels * panel_bytes;
    CUTE_NO_UNROLL
    for (int slab = 0; slab < params.slabs; ++slab, ++number) {
      const int slot = number % C::kStages;
      Barrier::wait(&shared.empty[slot], number / C::kStages % 2 ^ 1);
      Barrier::arrive_and_expect_tx(&shared.full[slot], C::kPanels * C::kPanelStageBytes);
      CUTE_UNROLL
      for (int panel = 0; panel < C::kPanels; ++panel) {
        cute::SM90_BULK_COPY_G2S::copy(from + panel * panel_bytes, &shared.full[slot],
                                       shared.weights[slot][panel], C::kPanelStageBytes);
      }
      from += C::kPanelStageBytes;
    }
  }
}

template <class C>
CUTE_DEVICE void load_tokens(Params const& params, Shared<C>& shared) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int number = 0;
  for (int tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    int8_t const* from =
        params.tokens + int64_t(tile % params.token_tiles) * params.slabs * C::kStageTokenBytes;
    CUTE_NO_UNROLL
    for (int slab = 0; slab < params.slabs; ++slab, ++number) {
      const int slot = number % C::kStages;
      Barrier::wait(&shared.empty[slot], number / C::kStages % 2 ^ 1);
      Barrier::arrive_and_expect_tx(&shared.full[slot], C::kStageTokenBytes);
      cute::SM90_BULK_COPY_G2S::copy(from, &shared.full[slot], shared.tokens[slot],
                                     C::kStageTokenBytes);
      from += C::kStageTokenBytes;
    }
  }
}

// ExCP: decodes the slabs of one MMA group into shared memory, in the swizzled order of operand A.
template <class C>
CUTE_DEVICE void dequantize_for(
    Params const& params, Shared<C>& shared, int worker, int panel, int k_group) {
  const int thread = threadIdx.x % kWarpGroupThreads;
  const int lane = thread % 32;
  // stmatrix: this lane names the row of 16 bytes that starts (row, k) of each k step.
  const int row = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
  const int k_of_lane = lane / 16 * 16;
  int stages_done = 0;
  for (int tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    for (Cursor<C> at(stages_done, k_group); at.slab < params.slabs; at.advance()) {
      Barrier::wait(&shared.full[at.slot()], at.phase());
      Barrier::wait(&shared.taken[worker][at.buffer()], at.buffer_phase() ^ 1);
      int8_t* const target = shared.decoded[worker] + at.buffer() * kBlockRows * C::kStageK;
      CUTE_UNROLL
      for (int block = 0; block < C::kStageBlocks; ++block) {
        uint32_t weights[8];
        dequantize<C>(shared.weights[at.slot()][panel] + block * LiquidQuant::kBlockBytes, thread,
                      weights);
        CUTE_UNROLL
        for (int step = 0; step < 2; ++step) {
          const int k = block * kBlockK + step * kMmaK + k_of_lane;
          int8_t* const to =
              target + k / 128 * kBlockRows * 128 + row * 128 + (k % 128 ^ row % 8 * 16);
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                           cute::cast_smem_ptr_to_uint(to)),
                       "r"(weights[4 * step]), "r"(weights[4 * step + 1]),
                       "r"(weights[4 * step + 2]), "r"(weights[4 * step + 3])
                       : "memory");
        }
      }
      cutlass::arch::fence_view_async_shared();
      warp_arrive(&shared.ready[worker][at.buffer()]);
      warp_arrive(&shared.empty[at.slot()]);
    }
    stages_done += params.slabs;
  }
}

// The main loops: each adds one group's share of a tile to acc.
template <class C>
struct MainLoop {
  static constexpr int kSteps = 2 * C::kStageBlocks;

  Shared<C>& shared;
  int worker, panel, k_group;
  int thread = threadIdx.x % kWarpGroupThreads;

  CUTE_DEVICE auto tokens() const {
    using namespace cute;
    Tensor sX = make_tensor(make_smem_ptr(&shared.tokens[0][0]), typename C::TokenLayout{});
    auto thread_mma = typename C::Mma{}.get_thread_slice(thread);
    return thread_mma.make_fragment_B(thread_mma.partition_B(sX));  // (MMA, 1, k step, slot)
  }

  // Baseline and lqq: dequantize a stage, meet, multiply it, meet.
  template <class Accumulator>
  CUTE_DEVICE void in_turn(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor tCrW =
        make_tensor<int8_t>(make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, Int<kSteps>{})));
    auto registers = recast<uint32_t>(tCrW);
    const int rounds = (slabs + C::kKGroups - 1) / C::kKGroups;
    Cursor<C> at(stages_done, k_group);
    for (int round = 0; round < rounds; ++round, at.advance()) {
      const bool mine = at.slab < slabs;
      if (mine) {
        Barrier::wait(&shared.full[at.slot()], at.phase());
        CUTE_UNROLL
        for (int block = 0; block < C::kStageBlocks; ++block) {
          uint32_t weights[8];
          dequantize<C>(shared.weights[at.slot()][panel] + block * LiquidQuant::kBlockBytes, thread,
                        weights);
          CUTE_UNROLL
          for (int r = 0; r < 8; ++r)
            registers(r % 4, 0, 2 * block + r / 4) = weights[r];
        }
      }
      meet(C::kMmaThreads, kDequantized);
      if (mine) {
        warpgroup_fence_operand(tCrW);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step)
          gemm(mma, tCrW(_, _, step), tCrX(_, _, step, at.slot()), acc);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc);
        warp_arrive(&shared.empty[at.slot()]);
      }
      meet(C::kMmaThreads, kMultiplied);
    }
  }

  // ImFP: two A buffers; a block is dequantized under the multiplication of the one before.
  template <class Accumulator>
  CUTE_DEVICE void overlapped(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor tCrW =
        make_tensor<int8_t>(make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, _2{}, _2{})));
    Cursor<C> at(stages_done, k_group);
    const int first = at.slab;
    for (; at.slab < slabs; at.advance()) {
      Barrier::wait(&shared.full[at.slot()], at.phase());
      CUTE_UNROLL
      for (int block = 0; block < C::kStageBlocks; ++block) {
        Tensor tCrW_block = tCrW(_, _, _, block % 2);
        uint32_t weights[8];
        dequantize<C>(shared.weights[at.slot()][panel] + block * LiquidQuant::kBlockBytes, thread,
                      weights);
        auto registers = recast<uint32_t>(tCrW_block);
        CUTE_UNROLL
        for (int r = 0; r < 8; ++r)
          registers(r % 4, 0, r / 4) = weights[r];
        warpgroup_fence_operand(tCrW_block);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        gemm(mma, tCrW_block(_, _, 0), tCrX(_, _, 2 * block, at.slot()), acc);
        gemm(mma, tCrW_block(_, _, 1), tCrX(_, _, 2 * block + 1, at.slot()), acc);
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        if (block == 0)
          warp_arrive(&shared.empty[at.slot_before()], at.slab != first);
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    warp_arrive(&shared.empty[at.slot_before()], slabs > first);
  }

  // ExCP: multiplies what a dequantizer has put into shared memory.
  template <class Accumulator>
  CUTE_DEVICE void from_shared(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor sW = make_tensor(make_smem_ptr(shared.decoded[worker]), typename C::DecodedLayout{});
    auto thread_mma = mma.get_thread_slice(thread);
    Tensor tCrW = thread_mma.make_fragment_A(thread_mma.partition_A(sW));  // (MMA, 1, step, buffer)
    Cursor<C> at(stages_done, k_group);
    const int first = at.slab;
    for (; at.slab < slabs; at.advance()) {
      Barrier::wait(&shared.full[at.slot()], at.phase());
      Barrier::wait(&shared.ready[worker][at.buffer()], at.buffer_phase());
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step)
        gemm(mma, tCrW(_, _, step, at.buffer()), tCrX(_, _, step, at.slot()), acc);
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warp_arrive(&shared.empty[at.slot_before()], at.slab != first);
      warp_arrive(&shared.taken[worker][at.buffer() ^ 1], at.slab != first);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    warp_arrive(&shared.empty[at.slot_before()], slabs > first);
    warp_arrive(&shared.taken[worker][at.buffer() ^ 1], slabs > first);
  }
};

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
