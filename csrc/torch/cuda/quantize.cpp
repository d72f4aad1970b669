#include "liquidgemm/quantize.hpp"

#include "context.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

std::tuple<Tensor, Tensor> quantize_activation_op(Tensor const& x) {
  check_rows(x, kFloats);
  const int64_t m = rows_of(x), k = x.size(-1);
  check(m <= INT32_MAX, "quantize_activation: expected fewer than 2^31 rows, got ", m);

  const DeviceGuard guard(x.get_device_index());
  hopper_device("quantize_activation");
  const cudaStream_t stream = current_stream(x);
  const Tensor rows = dense(x);
  Tensor quantized = allocate(x, with_last(leading_sizes(x), k), ScalarType::Char);
  Tensor scale = allocate(x, leading_sizes(x), ScalarType::Float);
  check_cuda(quantize_activation({.x = rows.const_data_ptr(),
                                  .x_type = element_of(x.scalar_type()),
                                  .out = static_cast<int8_t*>(quantized.mutable_data_ptr()),
                                  .out_stride = k,
                                  .scale = static_cast<float*>(scale.mutable_data_ptr()),
                                  .m = m,
                                  .k = k},
                                 stream),
             "quantize_activation");
  return {quantized, scale};
}

}  // namespace liquidgemm::binding
