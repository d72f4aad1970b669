#include "liquidgemm/pack.hpp"

#include "context.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

Tensor pack_weight_op(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset) {
  const LogicalTensors logical = checked_logical(qweight, qscale, qoffset);
  const DeviceGuard guard(qweight.get_device_index());
  hopper_device("pack_weight");
  const cudaStream_t stream = current_stream(qweight);
  Tensor packed = logical.visit([&](auto of, auto const& weight) {
    return empty_packed<typename decltype(of)::type>(qweight, weight);
  });
  Tensor infeasible = torch::stable::new_zeros(qweight, {1}, ScalarType::Int);
  int* const flag = static_cast<int*>(infeasible.mutable_data_ptr());
  uint8_t* const to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  check_cuda(logical.visit(
                 [&](auto, auto const& weight) { return pack_weight(weight, to, flag, stream); }),
             "pack_weight");
  int found = 0;  // packing happens once per model: this is the one place that waits for the GPU
  check_cuda(cudaMemcpyAsync(&found, flag, sizeof(found), cudaMemcpyDeviceToHost, stream),
             "pack_weight");
  check_cuda(cudaStreamSynchronize(stream), "pack_weight");
  check(!found, kInfeasible);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight_op(Tensor const& packed, int64_t n) {
  const LogicalTensors logical = empty_logical(packed, n);
  const DeviceGuard guard(packed.get_device_index());
  hopper_device("unpack_weight");
  const Tensor source = dense(packed);
  auto const* const from = static_cast<uint8_t const*>(source.const_data_ptr());
  check_cuda(logical.visit([&](auto, auto const& weight) {
    return unpack_weight(from, weight, current_stream(packed));
  }),
             "unpack_weight");
  return {logical.qweight, logical.qscale, logical.qoffset};
}

Tensor pack_int8_weight_op(Tensor const& qweight) {
  const LogicalInt8Tensors logical = checked_logical_int8(qweight);
  const DeviceGuard guard(qweight.get_device_index());
  hopper_device("pack_int8_weight");
  Tensor packed = empty_packed<Int8>(qweight, logical.view());
  check_cuda(pack_weight(logical.view(), static_cast<uint8_t*>(packed.mutable_data_ptr()),
                         current_stream(qweight)),
             "pack_int8_weight");
  return packed;
}

Tensor unpack_int8_weight_op(Tensor const& packed, int64_t n) {
  const LogicalInt8Tensors logical = empty_logical_int8(packed, n);
  const DeviceGuard guard(packed.get_device_index());
  hopper_device("unpack_int8_weight");
  const Tensor source = dense(packed);
  check_cuda(unpack_weight(static_cast<uint8_t const*>(source.const_data_ptr()), logical.view(),
                           current_stream(packed)),
             "unpack_int8_weight");
  return logical.qweight;
}

}  // namespace liquidgemm::binding
