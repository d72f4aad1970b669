// What the roles of ablation.hpp share: sizes, parameters, shared memory and who is at which slab.
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

}  // namespace ablation
