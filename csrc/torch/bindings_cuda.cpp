// The CUDA side of the torch ops: check, guard, stream, allocate, one call.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "liquidgemm/gemm.hpp"
#include "product.hpp"

namespace liquidgemm::binding {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::string version_name(int cuda_version) {
  return message(cuda_version / 1000, ".", cuda_version % 1000 / 10);
}

// In words where there is something to do about it, else in CUDA's.
std::string explain(cudaError_t error) {
  const std::string built_with =
      message("liquidgemm was built with CUDA ", version_name(CUDART_VERSION));
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int supported = 0;
      cudaDriverGetVersion(&supported);
      return message(built_with, ", but the NVIDIA driver supports CUDA ", version_name(supported),
                     " at most: it needs a newer driver");
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return message(built_with,
                     " for GPUs of compute capability 9.0 (Hopper) and holds no code "
                     "that this GPU or its driver can run");
    default:
      return message(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  }
}

void check_cuda(cudaError_t error, char const* what) {
  if (error != cudaSuccess)
    fail(what, ": ", explain(error));
}

// Call with the device current.
DeviceInfo hopper_device(char const* op) {
  DeviceInfo info{};
  check_cuda(query_device(info), op);
  check(info.compute_capability == 90, op, ": needs a GPU of compute capability 9.0 (Hopper), got ",
        info.compute_capability / 10, ".", info.compute_capability % 10);
  return info;
}

cudaStream_t current_stream(Tensor const& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool aligned_to_16(Tensor const& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// int8 rows as TMA wants them: a 16-byte aligned base and row stride.
struct Tokens {
  Tensor storage;
  int64_t stride;
};

Tokens empty_tokens(Tensor const& like, int64_t m, int64_t k) {
  const int64_t stride = ceil_div(k, 16) * 16;
  return {torch::stable::new_empty(like, {m, stride}, ScalarType::Char), stride};
}

Tokens aligned_tokens(Tensor const& x, int64_t m, int64_t k, cudaStream_t stream) {
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= k && x.stride(0) % 16 == 0 &&
      aligned_to_16(x)) {
    return {x, x.stride(0)};
  }
  Tensor dense = torch::stable::contiguous(x);
  if (k % 16 == 0 && aligned_to_16(dense))
    return {dense, k};
  Tokens tokens = empty_tokens(x, m, k);
  check_cuda(cudaMemcpy2DAsync(tokens.storage.mutable_data_ptr(), tokens.stride,
                               dense.const_data_ptr(), k, k, m, cudaMemcpyDeviceToDevice, stream),
             "x");
  return tokens;
}

// The kernel's bulk copies read multiples of 16 bytes.
Weight aligned_weight(Tensor const& x,
                      Tensor const& weight,
                      Tensor const& weight_scale,
                      OptionalTensor const& bias) {
  Weight result = checked_weight(x, weight, weight_scale, bias);
  if (!aligned_to_16(result.packed))
    result.packed = torch::stable::clone(result.packed);
  return result;
}

// num_sms > 0 overrides the device's SM count.
Problem checked_problem(
    char const* op, int64_t m, int64_t n, int64_t k, DeviceInfo const& device, int num_sms = 0) {
  check(m <= INT32_MAX && n <= INT32_MAX, op, ": expected M and N below 2^31, got M = ", m,
        ", N = ", n);
  return {m, n, k, num_sms > 0 ? num_sms : device.num_sms, device.memory_bytes_per_us};
}

// `forced` overrides the heuristic.
Tensor run_gemm(char const* op,
                Tokens const& tokens,
                float const* x_scale,  // null if the GEMM is to quantize
                std::vector<int64_t> const& leading,
                int64_t m,
                int64_t k,
                Weight const& weight,
                ScalarType out_type,
                DeviceInfo const& device,
                cudaStream_t stream,
                std::optional<Plan> forced = std::nullopt,
                int num_sms = 0,
                bool x_is_new = false) {
  const int64_t n = weight.n();
  const Problem problem = checked_problem(op, m, n, k, device, num_sms);
  Tensor y = torch::stable::new_empty(weight.packed, with_last(leading, n), out_type);
  GemmArguments arguments{};
  arguments.x = tokens.storage.const_data_ptr();
  arguments.x_type = x_scale ? Element::kInt8 : element_of(tokens.storage.scalar_type());
  arguments.x_stride = tokens.stride;
  arguments.x_scale = x_scale;
  arguments.x_is_new = x_is_new;
  arguments.weight = static_cast<uint8_t const*>(weight.packed.const_data_ptr());
  arguments.weight_scale = static_cast<float const*>(weight.scale.const_data_ptr());
  arguments.bias = weight.bias ? weight.bias->const_data_ptr() : nullptr;
  arguments.bias_type = weight.bias ? element_of(weight.bias->scalar_type()) : Element::kFloat32;
  arguments.y = y.mutable_data_ptr();
  arguments.y_stride = n;
  arguments.y_type = element_of(out_type);
  arguments.m = m;
  arguments.n = n;
  arguments.k = k;
  if (m == 0)
    return y;
  const Plan plan = forced ? *forced : select_plan(problem);
  const cudaError_t error = gemm(arguments, plan, problem.num_sms, stream);
  if (error != cudaSuccess)
    fail(op, ": ", explain(error), ", for ", describe(problem, plan));
  return y;
}

Tensor checked_gemm(char const* op,
                    Tensor const& x,
                    Tensor const& x_scale,
                    Tensor const& weight,
                    Tensor const& weight_scale,
                    OptionalTensor const& bias,
                    OptionalType const& out_dtype,
                    std::optional<Plan> forced,
                    int num_sms) {
  check_quantized_rows(x, x_scale);
  const Weight checked = aligned_weight(x, weight, weight_scale, bias);
  const ScalarType out_type = checked_out_type(out_dtype, bias);

  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device(op);
  const cudaStream_t stream = current_stream(x);
  const int64_t m = rows_of(x);
  const int64_t k = x.size(-1);
  const Tensor scale = torch::stable::contiguous(x_scale);
  const Tokens tokens = aligned_tokens(x, m, k, stream);
  return run_gemm(op, tokens, static_cast<float const*>(scale.const_data_ptr()), leading_sizes(x),
                  m, k, checked, out_type, device, stream, forced, num_sms);
}

Tensor gemm_op(Tensor const& x,
               Tensor const& x_scale,
               Tensor const& weight,
               Tensor const& weight_scale,
               OptionalTensor const& bias,
               OptionalType const& out_dtype) {
  return checked_gemm("gemm", x, x_scale, weight, weight_scale, bias, out_dtype, std::nullopt, 0);
}

Plan checked_plan(int64_t config) {
  const int64_t plans = all_plans().size();
  check(config >= 0 && config < plans, "config: expected 0 to ", plans - 1, ", got ", config);
  return all_plans()[config];
}

int checked_sms(int64_t num_sms) {
  check(num_sms >= 0, "num_sms: expected 0 (all) or more, got ", num_sms);
  return static_cast<int>(num_sms);
}

Tensor gemm_with_config(Tensor const& x,
                        Tensor const& x_scale,
                        Tensor const& weight,
                        Tensor const& weight_scale,
                        OptionalTensor const& bias,
                        OptionalType const& out_dtype,
                        int64_t config,
                        int64_t num_sms) {
  return checked_gemm("gemm_with_config", x, x_scale, weight, weight_scale, bias, out_dtype,
                      checked_plan(config), checked_sms(num_sms));
}

// Quantizes the rows of x into `tokens` and a new scale tensor of x's leading shape.
Tensor quantize_into(
    char const* op, Tensor const& x, Tokens& tokens, int64_t m, int64_t k, cudaStream_t stream) {
  const Tensor dense = torch::stable::contiguous(x);
  Tensor scale = torch::stable::new_empty(x, leading_sizes(x), ScalarType::Float);
  check(m <= INT32_MAX, op, ": expected fewer than 2^31 rows, got ", m);
  const QuantizeArguments arguments{dense.const_data_ptr(),
                                    element_of(x.scalar_type()),
                                    static_cast<int8_t*>(tokens.storage.mutable_data_ptr()),
                                    tokens.stride,
                                    static_cast<float*>(scale.mutable_data_ptr()),
                                    m,
                                    k};
  check_cuda(quantize_activation(arguments, stream), op);
  return scale;
}

std::tuple<Tensor, Tensor> quantize_activation_op(Tensor const& x) {
  check_rows(x, kFloats);
  const DeviceGuard guard(x.get_device_index());
  hopper_device("quantize_activation");
  const int64_t k = x.size(-1);
  Tokens tokens{torch::stable::new_empty(x, with_last(leading_sizes(x), k), ScalarType::Char), k};
  const Tensor scale =
      quantize_into("quantize_activation", x, tokens, rows_of(x), k, current_stream(x));
  return {tokens.storage, scale};
}

// Whether a GEMM could read x as it is, to quantize it.
bool has_aligned_16_bits(Tensor const& dense) {
  return dense.scalar_type() != ScalarType::Float && aligned_to_16(dense);
}

Tensor linear_op(Tensor const& x,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias) {
  check_rows(x, kFloats);
  const Weight checked = aligned_weight(x, weight, weight_scale, bias);
  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device("linear");
  const cudaStream_t stream = current_stream(x);
  const int64_t m = rows_of(x);
  const int64_t k = x.size(-1);
  const auto run = [&](Tokens const& tokens, float const* scale, std::optional<Plan> plan) {
    return run_gemm("linear", tokens, scale, leading_sizes(x), m, k, checked, x.scalar_type(),
                    device, stream, plan, 0, scale != nullptr);
  };
  if (m == 0)
    return run({x, k}, nullptr, std::nullopt);
  const Tensor dense = torch::stable::contiguous(x);
  const Problem problem = checked_problem("linear", m, checked.n(), k, device);
  if (m <= kMostQuantizedTokens && has_aligned_16_bits(dense)) {  // else no need to look for a plan
    const Plan plan = select_plan(problem);
    if (pays_to_quantize(problem, plan))
      return run({dense, k}, nullptr, plan);
  }
  Tokens tokens = empty_tokens(x, m, k);
  const Tensor scale = quantize_into("linear", dense, tokens, m, k, stream);
  return run(tokens, static_cast<float const*>(scale.const_data_ptr()), select_plan(problem, true));
}

// In one launch, whether that pays or not.
Tensor linear_with_config(Tensor const& x,
                          Tensor const& weight,
                          Tensor const& weight_scale,
                          OptionalTensor const& bias,
                          int64_t config,
                          int64_t num_sms) {
  check_rows(x, kFloats);
  const Weight checked = aligned_weight(x, weight, weight_scale, bias);
  const Plan plan = checked_plan(config);
  const int sms = checked_sms(num_sms);
  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device("linear_with_config");
  const int64_t m = rows_of(x);
  const int64_t k = x.size(-1);
  const Tensor dense = torch::stable::contiguous(x);
  check(has_aligned_16_bits(dense) && fits_quantized(m, k, plan), "config: ", name(plan),
        " cannot quantize ", m, " tokens of K = ", k);
  return run_gemm("linear_with_config", {dense, k}, nullptr, leading_sizes(x), m, k, checked,
                  x.scalar_type(), device, current_stream(x), plan, sms);
}

Tensor pack_weight_op(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset) {
  const LogicalTensors logical = checked_logical(qweight, qscale, qoffset);
  const DeviceGuard guard(qweight.get_device_index());
  hopper_device("pack_weight");
  const cudaStream_t stream = current_stream(qweight);
  Tensor packed = empty_packed(logical);
  Tensor infeasible = torch::stable::new_zeros(qweight, {1}, ScalarType::Int);
  int* const flag = static_cast<int*>(infeasible.mutable_data_ptr());
  check_cuda(
      pack_weight(logical.view(), static_cast<uint8_t*>(packed.mutable_data_ptr()), flag, stream),
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
  const Tensor source = torch::stable::contiguous(packed);
  check_cuda(unpack_weight(static_cast<uint8_t const*>(source.const_data_ptr()), logical.view(),
                           current_stream(packed)),
             "unpack_weight");
  return {logical.qweight, logical.qscale, logical.qoffset};
}

}  // namespace
}  // namespace liquidgemm::binding

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CUDA, m) {
  using namespace liquidgemm::binding;
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_op));
  m.impl("gemm", TORCH_BOX(&gemm_op));
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("pack_weight", TORCH_BOX(&pack_weight_op));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_op));
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_testing, CUDA, m) {
  m.impl("gemm_with_config", TORCH_BOX(&liquidgemm::binding::gemm_with_config));
  m.impl("linear_with_config", TORCH_BOX(&liquidgemm::binding::linear_with_config));
}
