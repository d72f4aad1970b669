// Tokens that the consumers quantize themselves, if there are very few: a linear layer is then one
// launch instead of two.
//
// Each CTA reads all of x for the rows' maxima (x is small and in the L2 cache), and keeps its own
// part of K as operand B for all of its tiles. The operand's layout has no swizzle: core
// matrices of 8 tokens x 16 bytes. The values of rows past
// the last token do not matter. Core matrices of neighbouring k therefore overlap, so that m rows
// occupy the space of m rows and not of eight:
//
//   byte k of token r is at (k / 16) * chunk_stride + 16 * r + k % 16
//
// chunk_stride is an odd multiple of 16 bytes, so that storing one token's consecutive chunks is
// free of bank conflicts.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/storage.hpp"
#include "liquidgemm/producers/quantizer.hpp"

namespace liquidgemm {

template <class Tile>
class QuantizedTokens {
  using T = typename Tile::Input;
  static constexpr int kWarps = Tile::kConsumerThreads / 32;
  static constexpr int kWarpElements = 32 * kVector;
  // Vectors that a thread keeps.
  static constexpr int kHeld = kMostQuantizedElements / Tile::kConsumerThreads / kVector;

 public:
  CUTE_DEVICE static void prefetch_descriptor(CUtensorMap const&) {}

  // There is nothing to load; the thread only lets the next kernel start.
  template <class Work>
  CUTE_DEVICE static void load(CUtensorMap const&,
                               Sizes const&,
                               Work const&,
                               SharedStorage<Tile>&) {
    wait_on_dependent_grids();
    launch_dependent_grids();
  }

  // Operand B of a k step of a stage, counted from this CTA's first.
  template <class Mma>
  class Operands {
   public:
    CUTE_DEVICE Operands(Sizes const& sizes, SharedStorage<Tile>& shared)
        : sizes_(sizes), shared_(shared) {}

    CUTE_DEVICE auto operator()(int step, int /*slot*/, int stage) const {
      return operand(sizes_, shared_, stage * (Tile::kStageK / kMmaK) + step);
    }

   private:
    Sizes const& sizes_;
    SharedStorage<Tile>& shared_;
  };

  // Quantizes the stages begin to end of K and computes the scales. All consumers call it; they
  // share one panel.
  CUTE_DEVICE static void quantize(Sizes const& sizes,
                                   TokenParams const& params,
                                   SharedStorage<Tile>& shared,
                                   int begin,
                                   int end) {
    const Reader reader(sizes, params);
    Vector<T> held[kHeld];
    reader.for_each_vector([&](int i) { reader.load(held[i], i); });
    Largest<T> of_thread;
    reader.for_each_vector([&](int i) { of_thread.add(held[i]); });
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, of_thread.float_bits());
    const int lane = threadIdx.x % 32;
    if (lane == 0)
      shared.largest[threadIdx.x / 32] = of_warp;
    panel_barrier<Tile>(0);
    if (threadIdx.x == 0)
      cutlass::arch::ClusterBarrier::arrive(&shared.barriers.read);
    if (reader.row < sizes.m) {
      const uint32_t largest = __reduce_max_sync(
          0xffffffffu, lane < reader.warps ? shared.largest[reader.row * reader.warps + lane] : 0u);
      const float scale = activation_scale(largest);
      if (reader.at(0) == 0)
        shared.quantized_scale[reader.row] = scale;
      const Quantizer quantizer(scale);
      const int first_k = begin * Tile::kStageK;
      const int ks = (end - begin) * Tile::kStageK;
      const int stride = static_cast<int>(quantized_chunk_stride(sizes.m));
      int8_t* const row = shared.tokens + 16 * reader.row;
      auto const write = [&](int i, auto common) {
        const int k = reader.at(i) - first_k;
        if (k >= 0 && k < ks) {
          *reinterpret_cast<uint2*>(row + k / 16 * stride + k % 16) =
              quantizer.quantize<decltype(common)::value>(held[i]);
        }
      };
      if (Quantizer::is_common(scale)) {
        reader.for_each_vector([&](int i) { write(i, std::true_type{}); });
      } else {
        reader.for_each_vector([&](int i) { write(i, std::false_type{}); });
      }
      cutlass::arch::fence_view_async_shared();  // written here, read by wgmma
    }
    panel_barrier<Tile>(0);
  }

 private:
  // Operand B of 32 k, counted from this CTA's first.
  CUTE_DEVICE static auto operand(Sizes const& sizes, SharedStorage<Tile>& shared, int k_step) {
    const int stride = static_cast<int>(quantized_chunk_stride(sizes.m));
    cute::GmmaDescriptor descriptor{};
    descriptor.bitfield.layout_type_ =
        static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::INTERLEAVE);
    descriptor.bitfield.start_address_ =
        (cute::cast_smem_ptr_to_uint(shared.tokens) + k_step * (kMmaK / 16) * stride) >> 4;
    descriptor.bitfield.leading_byte_offset_ = stride >> 4;  // from core matrix to core matrix
    return cute::make_tensor(cute::SM90::GMMA::DescriptorIterator{descriptor},
                             cute::make_layout(cute::make_shape(cute::_1{}, cute::_1{})));
  }

  // A power of two of warps reads a row; consecutive lanes read consecutive vectors.
  struct Reader {
    T const* x;
    int k, warps, row, first, vectors;

    CUTE_DEVICE Reader(Sizes const& sizes, TokenParams const& params) : k(params.k) {
      const int log2_rows = 32 - __clz(sizes.m - 1);  // m = 1: 0
      const int warp = cutlass::canonical_warp_idx_sync();
      warps = kWarps >> log2_rows;
      row = warp / warps;
      x = static_cast<T const*>(params.source) + int64_t(row) * k;
      const int first_of_warp = warp % warps * kWarpElements;
      first = first_of_warp + threadIdx.x % 32 * kVector;
      // To the end of the last stage, zeros past that of the row.
      const int padded = (k + Tile::kStageK - 1) / Tile::kStageK * Tile::kStageK;
      const int step = warps * kWarpElements;
      vectors = row < sizes.m ? (padded - first_of_warp + step - 1) / step : 0;
    }

    CUTE_DEVICE int at(int i) const { return first + i * warps * kWarpElements; }
    CUTE_DEVICE void load(Vector<T>& vector, int i) const {
      if (at(i) < k) {
        vector.load(x + at(i), kVector, true);
      } else {
        vector = {};
      }
    }
    // Unrolled to keep the vectors in registers. The early exit saves instruction fetches.
    template <class Body>
    CUTE_DEVICE void for_each_vector(Body const& body) const {
      CUTE_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (i >= vectors)
          break;
        body(i);
      }
    }
  };
};

}  // namespace liquidgemm
