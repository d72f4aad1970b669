// What the KV cache's kernels are given.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

enum class KvFormat : int { kInt8, kInt4 };

inline constexpr int kKvPageMultiple = 16;      // page_tokens is a multiple
inline constexpr int kKvMaxCapacity = 1 << 23;  // tokens of a sequence, by the sums' 32 bits
inline constexpr int kKvMaxChunks = 64;         // partial results of a sequence and a head

struct KvCache {
  KvFormat format;
  int head_dim;  // 64, 128 or 256
  int heads;
  int page_tokens;
  void *k, *v;                // codes
  void *k_params, *v_params;  // all four aligned to 16 bytes
  int const* block_table;     // [batch, table_stride], or null: sequence b has page b
  int table_stride;
  int capacity;        // tokens that a sequence may have
  int const* lengths;  // [batch]
};

struct KvWriteArguments {
  KvCache cache;
  void const *k, *v;                 // [batch, tokens, heads, head_dim]
  int64_t k_stride[3], v_stride[3];  // of batch, tokens and heads, in elements
  Element type;                      // of k and v
  float const* center;               // [1 or batch, heads, head_dim], or null
  bool center_per_sequence;
  int batch, tokens;
};

struct KvAttentionArguments {
  KvCache cache;
  void const* q;        // [batch, queries, heads * group, head_dim]
  int64_t q_stride[3];  // of batch, queries and heads, in elements
  Element type;         // of q and out
  int batch, queries, group;
  float scale;        // of the scores
  float softcap;      // 0: none
  int window;         // tokens that a query sees, itself included; 0: all
  int const* starts;  // [batch]: the first token that is no padding; or null
  float* partial;     // see kv_attention()
  float2* stats;      // largest score, sum of probabilities
  void* out;          // like q, without gaps
  int num_sms;
};

}  // namespace liquidgemm
