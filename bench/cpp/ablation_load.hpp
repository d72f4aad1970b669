// Weights and tokens come into shared memory; packed weights become INT8.
#pragma once

#include "ablation_config.hpp"

namespace ablation {

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

}  // namespace ablation
