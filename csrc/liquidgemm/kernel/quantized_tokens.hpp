// Activations that a CTA quantizes itself, for very few tokens: linear layers without a kernel
// between two of them.
//
// Each CTA reads all of x, which is little and in the L2 cache, for the rows' maxima, and keeps its
// own share of K as operand B for all of its tiles. Its layout is one without a swizzle: core
// matrices of 8 tokens x 16 bytes. Those of neighbouring k overlap, as the rows past the last token
// may hold anything, so that m rows take the place of m and not of eight:
//
//   byte k of token r is at (k / 16) * chunk_stride + 16 * r + k % 16
//
// chunk_stride is an odd multiple of 16 bytes: whoever writes a token to chunks in a row meets all
// banks.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/partial_sums.hpp"
#include "liquidgemm/kernel/ring.hpp"
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
  // Operand B of 32 k, counted from this CTA's first.
  CUTE_DEVICE static auto operand(KernelParams const& params,
                                  SharedStorage<Tile>& shared,
                                  int k_step) {
    const int stride = static_cast<int>(quantized_chunk_stride(params.m));
    cute::GmmaDescriptor descriptor{};
    descriptor.bitfield.layout_type_ =
        static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::INTERLEAVE);
    descriptor.bitfield.start_address_ =
        (cute::cast_smem_ptr_to_uint(shared.tokens) + k_step * (kMmaK / 16) * stride) >> 4;
    descriptor.bitfield.leading_byte_offset_ = stride >> 4;  // from core matrix to core matrix
    return cute::make_tensor(cute::SM90::GMMA::DescriptorIterator{descriptor},
                             cute::make_layout(cute::make_shape(cute::_1{}, cute::_1{})));
  }

  // By all consumers, a single panel's. Stages `begin` to `end` become operands, and the scales
  // known to all.
  CUTE_DEVICE static void quantize(KernelParams const& params,
                                   SharedStorage<Tile>& shared,
                                   int begin,
                                   int end) {
    const Reader reader(params);
    Vector<T> held[kHeld];
    reader.for_each_vector([&](int i) { reader.load(held[i], i); });
    Largest<T> of_thread;
    reader.for_each_vector([&](int i) { of_thread.add(held[i]); });
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, of_thread.float_bits());
    const int lane = threadIdx.x % 32;
    if (lane == 0)
      shared.largest[threadIdx.x / 32] = of_warp;
    const PartialSums<Tile> sums(params, shared, 0);
    sums.panel_barrier();
    if (threadIdx.x == 0)
      cutlass::arch::ClusterBarrier::arrive(&shared.read);
    if (reader.row < params.m) {
      const uint32_t largest = __reduce_max_sync(
          0xffffffffu, lane < reader.warps ? shared.largest[reader.row * reader.warps + lane] : 0u);
      const float scale = activation_scale(largest);
      if (reader.at(0) == 0)
        shared.quantized_scale[reader.row] = scale;
      const Quantizer quantizer(scale);
      const int first_k = begin * Tile::kStageK;
      const int ks = (end - begin) * Tile::kStageK;
      const int stride = static_cast<int>(quantized_chunk_stride(params.m));
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
    sums.panel_barrier();
  }

 private:
  // A row has a power of two of warps, whose lanes take its vectors in turns.
  struct Reader {
    T const* x;
    int k, warps, row, first, vectors;

    CUTE_DEVICE explicit Reader(KernelParams const& params) : k(params.k) {
      const int log2_rows = 32 - __clz(params.m - 1);  // m = 1: 0
      const int warp = cutlass::canonical_warp_idx_sync();
      warps = kWarps >> log2_rows;
      row = warp / warps;
      x = static_cast<T const*>(params.x) + int64_t(row) * k;
      const int first_of_warp = warp % warps * kWarpElements;
      first = first_of_warp + threadIdx.x % 32 * kVector;
      // To the end of the last stage, zeros past that of the row.
      const int padded = (k + Tile::kStageK - 1) / Tile::kStageK * Tile::kStageK;
      const int step = warps * kWarpElements;
      vectors = row < params.m ? (padded - first_of_warp + step - 1) / step : 0;
    }

    CUTE_DEVICE int at(int i) const { return first + i * warps * kWarpElements; }
    CUTE_DEVICE void load(Vector<T>& vector, int i) const {
      if (at(i) < k) {
        vector.load(x + at(i), kVector, true);
      } else {
        vector = {};
      }
    }
    // Unrolled, to keep them in registers, and left early: what is skipped is not fetched.
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
