// The epilogue: int32 partial sums -> y[m, n] = float(sum) * x_scale[m] * weight_scale[n] (+
// bias[n]), rounded after each operation, left to right.
//
// The accumulators hold Y transposed: for every octet of tokens a thread has two tokens of two
// channels, four words (octets.hpp). Sums of which other groups or CTAs have parts are completed
// first (reduce/). Then there are three ways to y:
//
//   store/rows.hpp       16 bits, one group per panel: by TMA, or whole rows of channels
//   store/columns.hpp    16 bits, k groups that take turns: an octet at a time, from registers
//   store/elements.hpp   other types and alignments
//
// At few tokens all of this is latency, and each instruction counts: a tile runs it once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/reduce/cluster.hpp"
#include "liquidgemm/kernel/reduce/pair.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/storage.hpp"
#include "liquidgemm/kernel/store/columns.hpp"
#include "liquidgemm/kernel/store/elements.hpp"
#include "liquidgemm/kernel/store/output_tile.hpp"
#include "liquidgemm/kernel/store/rows.hpp"

namespace liquidgemm {

template <class Tile>
class Epilogue {
  static constexpr int kScalesPerThread =
      (Tile::kTokens + Tile::kPanelThreads - 1) / Tile::kPanelThreads;

 public:
  CUTE_DEVICE Epilogue(Sizes const& sizes,
                       OutputParams const& params,
                       CUtensorMap const& map,
                       ClusterParams const& cluster,
                       SharedStorage<Tile>& shared,
                       int panel)
      : out_{sizes, params, shared, panel}, map_(map), cluster_(cluster) {}

  // TMA has read this CTA's staging: it may exit.
  CUTE_DEVICE void finish() const {
    if (Tile::kStoresByTma && out_.thread() == 0)
      cute::tma_store_wait<0>();
  }

  // Requests what does not depend on the sums, to arrive under the main loop.
  CUTE_DEVICE void prefetch(WorkItem const& work, Place const& place) {
    locate(work, place);
    // One register each: the first 64 threads carry the channels' scales, the next 64 their biases.
    const int channel = out_.first_channel + out_.thread() % kBlockRows;
    channel_value_ = -0.f;  // the bias that changes no bit of what it is added to
    if (channel < out_.sizes.n && out_.thread() < kBlockRows) {
      channel_value_ = out_.params.weight_scale[place.scale_offset + channel];
    } else if (channel < out_.sizes.n && out_.thread() < 2 * kBlockRows && out_.params.bias) {
      channel_value_ =
          load_as_float(out_.params.bias, out_.params.bias_type, place.scale_offset + channel);
    }
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = out_.thread() + i * Tile::kPanelThreads;
      if constexpr (Tile::kQuantizes) {
        token_scale_[i] = token < out_.tokens ? out_.shared.quantized_scale[token] : 0.f;
      } else {
        token_scale_[i] = token < out_.tokens ? out_.params.x_scale[out_.first_token + token] : 0.f;
      }
    }
  }

  template <class Scheduler, class Accumulator>
  CUTE_DEVICE void store(Scheduler const& scheduler, Accumulator& acc, int k_group) {
    begin_store(scheduler);
    OutputParams const& params = out_.params;
    const ClusterSums<Tile> sums = this->sums();
    // How y is stored is asked where it is branched upon: kept in a variable across the barriers,
    // it made ptxas take the whole role for divergent, down to the descriptors of the main loop.
    if constexpr (!Tile::kPairs) {
      const auto sums_of_group = sums.complete(scheduler.item(), acc, k_group);
      if (params.rows_are_vectors(out_.sizes) && params.y_type == Element::kBFloat16) {
        store_columns<__nv_bfloat162>(out_, sums, sums_of_group, k_group);
      } else if (params.rows_are_vectors(out_.sizes) && params.y_type == Element::kFloat16) {
        store_columns<__half2>(out_, sums, sums_of_group, k_group);
      } else {
        store_turns(out_, sums, sums_of_group, k_group);
      }
      sums.release(scheduler.is_last());
    } else {
      if (out_.split())
        exchange_in_pair(out_.shared, out_.panel, out_.ownership, out_.tokens, acc);
      panel_barrier<Tile>(out_.panel);  // the scales
      if (params.rows_are_vectors(out_.sizes) && params.y_type == Element::kBFloat16) {
        store_rows<__nv_bfloat162>(out_, map_, acc);
      } else if (params.rows_are_vectors(out_.sizes) && params.y_type == Element::kFloat16) {
        store_rows<__half2>(out_, map_, acc);
      } else {
        store_octets(out_, sums, acc);
      }
    }
  }

 protected:
  CUTE_DEVICE ClusterSums<Tile> sums() const { return {cluster_, out_.shared, out_.panel}; }

  template <class Scheduler>
  CUTE_DEVICE void begin_store(Scheduler const& scheduler) {
    const WorkItem work = scheduler.work();  // again, rather than hold registers in the main loop
    locate(work, scheduler.place(work));
    // Scales and staging are in use until all threads, and TMA, are done with the tile before.
    if (Tile::kStoresByTma && out_.thread() == 0)
      cute::tma_store_wait<0>();
    if (Tile::kPairs || scheduler.item() > 0)  // groups that take turns end one after the other
      panel_barrier<Tile>(out_.panel);
    stage_scales();
  }

  OutputTile<Tile> out_;
  CUtensorMap const& map_;  // of y

 private:
  CUTE_DEVICE void locate(WorkItem const& work, Place const& place) {
    out_.first_token = place.first_token;
    out_.tokens = place.tokens;
    out_.skipped = place.skipped;
    out_.first_channel = (place.first_panel + out_.panel) * kBlockRows;
    out_.ownership = work.split ? alternate_chunks() : Ownership::kAllChunks;
  }

  CUTE_DEVICE void stage_scales() {
    const int thread = out_.thread();
    if (thread < 2 * kBlockRows)
      out_.shared.channel_values[out_.panel][thread / kBlockRows][thread % kBlockRows] =
          channel_value_;
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = out_.thread() + i * Tile::kPanelThreads;
      if (token < Tile::kTokens)
        out_.shared.token_scale[out_.panel][token] = token_scale_[i];
    }
  }

  ClusterParams const& cluster_;
  float channel_value_;
  float token_scale_[kScalesPerThread];
};

}  // namespace liquidgemm
