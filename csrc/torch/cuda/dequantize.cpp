#include "liquidgemm/dequantize.hpp"

#include "context.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

Tensor dequantize_packed_op(Tensor const& weight,
                            Tensor const& weight_scale,
                            int64_t k,
                            ScalarType dtype) {
  check_dtype("weight", weight, {ScalarType::Byte});
  check_dtype("weight_scale", weight_scale, {ScalarType::Float});
  check_same_device("weight_scale", weight_scale, "weight", weight);
  check(weight_scale.dim() == 1 && weight_scale.size(0) >= 1,
        "weight_scale: expected shape [N], got ", shape_of(weight_scale));
  check(k >= 1, "k: expected at least 1, got ", k);
  check_k("k", k, kMaxK);
  const int64_t n = weight_scale.size(0);
  const FormatId format = format_of(weight);
  check_shape("weight", weight,
              {ceil_div(n, kBlockRows), ceil_div(k, kBlockK), block_bytes(format)}, " for N = ", n,
              " of weight_scale and K = ", k);
  check_dtype("dtype", dtype, kFloats, "");

  const DeviceGuard guard(weight.get_device_index());
  hopper_device("dequantize_packed");
  Tensor packed = dense(weight);
  if (!aligned_to_16(packed))
    packed = torch::stable::clone(packed);
  const Tensor scale = dense(weight_scale);
  Tensor out = allocate(weight, {n, k}, dtype);
  check_cuda(dequantize({.packed = static_cast<uint8_t const*>(packed.const_data_ptr()),
                         .scale = static_cast<float const*>(scale.const_data_ptr()),
                         .out = out.mutable_data_ptr(),
                         .type = element_of(dtype),
                         .n = n,
                         .k = k,
                         .format = format},
                        current_stream(weight)),
             "dequantize_packed");
  return out;
}

}  // namespace liquidgemm::binding
