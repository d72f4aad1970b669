// What a decode kernel is compiled for, and the sizes that follow.
#pragma once

#include "liquidgemm/attention/arguments.hpp"

namespace liquidgemm::attention {

// How codes and parameters come to shared memory, see line_loader.hpp and bulk_loader.hpp.
enum class Copies { kLines, kBulk };

template <KvFormat kFormat_, int kHeadDim_, int kTiles_, Copies kCopies_ = Copies::kLines>
struct DecodeShape {
  static constexpr KvFormat kFormat = kFormat_;
  static constexpr bool kInt4 = kFormat == KvFormat::kInt4;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTiles = kTiles_;  // of four query rows, in two digits each: 8 columns
  static constexpr bool kBulk = kCopies_ == Copies::kBulk;
  static constexpr int kRows = 4 * kTiles;
  static constexpr int kWidth = kInt4 ? kHeadDim / 2 : kHeadDim;  // bytes of a row of codes

  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlock = 32;                  // tokens that a warp works on at a time
  static constexpr int kHalf = kBlock / 2;           // lies in one page
  static constexpr int kHalfBytes = kHalf * kWidth;  // of keys, and of values

  // Blocks that each warp has in shared memory, 64 KB in all, and how many it works on in a chunk.
  static constexpr int kSlots = kWidth >= 256 ? 1 : kWidth == 128 ? 2 : 4;
  static constexpr int kBlocksPerChunk = 2 * kSlots;
  static constexpr int kChunk = kWarps * kBlocksPerChunk * kBlock;

  // A lane's piece of a key, and how many it has; pieces of values are 16 bytes of four tokens.
  static constexpr int kKeyPiece = kWidth == 32 ? 8 : 16;
  static constexpr int kKeyPieces = kWidth / (4 * kKeyPiece);
  static constexpr int kValuePieces = 4 * kWidth / 128;
  static constexpr int kPairBytes = kInt4 ? 8 : 4;  // parameters of two tokens

  // Steps of 32 dimensions of the scores: int4 takes two from the same bytes.
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr int kDimTiles = kHeadDim / 16;

  static constexpr int kParamBytes = kBlock / 2 * kPairBytes;  // of keys; as many of values
  static constexpr int kQueryPitch = kHeadDim + 8;
  static constexpr int kCtas = kTiles == 4 || kHeadDim == 256 ? 2 : 3;  // per SM

  static_assert(kKeyPieces >= 1 && kValuePieces >= 1 && kHalf == kKvPageMultiple);
};

// Tokens per chunk: more than kChunk where kKvMaxChunks of those do not cover the sequence.
template <class Shape>
__host__ __device__ constexpr int chunk_tokens(int length) {
  const int least = (length + kKvMaxChunks - 1) / kKvMaxChunks;
  const int whole = (least + Shape::kBlock - 1) / Shape::kBlock * Shape::kBlock;
  return whole > Shape::kChunk ? whole : Shape::kChunk;
}

// Chunks that a sequence has at most.
template <class Shape>
constexpr int max_chunks(int capacity) {
  const int chunks = capacity / Shape::kChunk + (capacity % Shape::kChunk != 0);
  return chunks < 1 ? 1 : chunks < kKvMaxChunks ? chunks : kKvMaxChunks;
}

// The first token of a sequence that is no padding.
__device__ inline int first_token(KvAttentionArguments const& a, int b) {
  return a.starts == nullptr ? 0 : a.starts[b];
}

// The chunks of a sequence that any of its queries sees.
struct Chunks {
  int tokens;      // of each
  int begin, end;  // indices
  int first;       // token that any query sees
  int length;
};

template <class Shape>
__device__ inline Chunks chunks_of(KvAttentionArguments const& a, int b) {
  Chunks chunks;
  chunks.length = max(min(a.cache.lengths[b], a.cache.capacity), 0);
  int first = first_token(a, b);
  if (a.window > 0)
    first = max(first, chunks.length - a.queries - a.window + 1);
  chunks.first = max(first, 0);
  chunks.tokens = chunk_tokens<Shape>(chunks.length);
  chunks.begin = chunks.first / chunks.tokens;
  chunks.end = (chunks.length + chunks.tokens - 1) / chunks.tokens;
  return chunks;
}

}  // namespace liquidgemm::attention
