// The KV cache's ops for codes of 8 and 4 bits. liquidgemm/kv/_ops.py has checked the arguments:
// what is checked here are limits of the kernels.
#include "liquidgemm/kv.hpp"

#include "context.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {
namespace {

KvCache cache_of(char const* op,
                 Tensor const& k,
                 Tensor const& v,
                 Tensor const& k_params,
                 Tensor const& v_params,
                 Tensor const& lengths,
                 OptionalTensor const& block_table) {
  const bool int4 = k.scalar_type() == ScalarType::Byte;
  const int64_t columns = block_table ? block_table->size(1) : 1;
  const int64_t capacity = k.size(2) * columns;
  check(capacity <= kKvMaxCapacity, op, ": expected at most ", kKvMaxCapacity,
        " tokens for a sequence, got ", capacity);
  check(k.size(1) <= UINT16_MAX && lengths.size(0) <= UINT16_MAX, op,
        ": expected at most 65535 heads and sequences, got ", k.size(1), " and ", lengths.size(0));
  for (auto const* cache : {&k, &v, &k_params, &v_params})
    check(aligned_to_16(*cache), op, ": expected caches that are aligned to 16 bytes");
  return {
      .format = int4 ? KvFormat::kInt4 : KvFormat::kInt8,
      .head_dim = static_cast<int>(k.size(3) * (int4 ? 2 : 1)),
      .heads = static_cast<int>(k.size(1)),
      .page_tokens = static_cast<int>(k.size(2)),
      .k = k.mutable_data_ptr(),
      .v = v.mutable_data_ptr(),
      .k_params = k_params.mutable_data_ptr(),
      .v_params = v_params.mutable_data_ptr(),
      .block_table = block_table ? static_cast<int const*>(block_table->const_data_ptr()) : nullptr,
      .table_stride = static_cast<int>(columns),
      .capacity = static_cast<int>(capacity),
      .lengths = static_cast<int const*>(lengths.const_data_ptr())};
}

// Elements of a row lie side by side.
Tensor with_dense_rows(Tensor const& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace

void kv_write_op(Tensor const& k,
                 Tensor const& v,
                 Tensor const& k_cache,
                 Tensor const& v_cache,
                 Tensor const& k_params,
                 Tensor const& v_params,
                 Tensor const& lengths,
                 OptionalTensor const& block_table,
                 OptionalTensor const& k_center) {
  const DeviceGuard guard(k.get_device_index());
  hopper_device("kv_write_");
  const cudaStream_t stream = current_stream(k);
  const Tensor keys = with_dense_rows(k), values = with_dense_rows(v);
  check(k.size(1) <= 4 * UINT16_MAX, "kv_write_: expected at most ", 4 * UINT16_MAX,
        " tokens of each sequence, got ", k.size(1));
  check_cuda(kv_write({.cache = cache_of("kv_write_", k_cache, v_cache, k_params, v_params, lengths,
                                         block_table),
                       .k = keys.const_data_ptr(),
                       .v = values.const_data_ptr(),
                       .k_stride = {keys.stride(0), keys.stride(1), keys.stride(2)},
                       .v_stride = {values.stride(0), values.stride(1), values.stride(2)},
                       .type = element_of(k.scalar_type()),
                       .center = k_center ? static_cast<float const*>(k_center->const_data_ptr())
                                          : nullptr,
                       .center_per_sequence = k_center && k_center->size(0) > 1,
                       .batch = static_cast<int>(k.size(0)),
                       .tokens = static_cast<int>(k.size(1))},
                      stream),
             "kv_write_");
}

Tensor kv_attention_op(Tensor const& q,
                       Tensor const& k_cache,
                       Tensor const& v_cache,
                       Tensor const& k_params,
                       Tensor const& v_params,
                       Tensor const& lengths,
                       double scale,
                       OptionalTensor const& block_table,
                       OptionalTensor const& starts,
                       int64_t window,
                       double softcap) {
  const DeviceGuard guard(q.get_device_index());
  const DeviceInfo device = hopper_device("kv_attention");
  const cudaStream_t stream = current_stream(q);
  const KvCache cache =
      cache_of("kv_attention", k_cache, v_cache, k_params, v_params, lengths, block_table);
  const Tensor queries = with_dense_rows(q);
  const int64_t batch = q.size(0), tokens = q.size(1), group = q.size(2) / cache.heads;
  const int64_t chunks = kv_max_chunks(cache.format, cache.head_dim, cache.capacity);
  Tensor partial =
      allocate(q, {batch, cache.heads, chunks, tokens * group, cache.head_dim}, ScalarType::Float);
  Tensor stats = allocate(q, {batch, cache.heads, chunks, tokens * group, 2}, ScalarType::Float);
  Tensor out = allocate(q, {batch, tokens, q.size(2), q.size(3)}, q.scalar_type());
  check_cuda(
      kv_attention({.cache = cache,
                    .q = queries.const_data_ptr(),
                    .q_stride = {queries.stride(0), queries.stride(1), queries.stride(2)},
                    .type = element_of(q.scalar_type()),
                    .batch = static_cast<int>(batch),
                    .queries = static_cast<int>(tokens),
                    .group = static_cast<int>(group),
                    .scale = static_cast<float>(scale),
                    .softcap = static_cast<float>(softcap),
                    .window = static_cast<int>(std::min<int64_t>(window, kKvMaxCapacity)),
                    .starts = starts ? static_cast<int const*>(starts->const_data_ptr()) : nullptr,
                    .partial = static_cast<float*>(partial.mutable_data_ptr()),
                    .stats = static_cast<float2*>(stats.mutable_data_ptr()),
                    .out = out.mutable_data_ptr(),
                    .num_sms = device.num_sms},
                   stream),
      "kv_attention");
  return out;
}

}  // namespace liquidgemm::binding
