#include "liquidgemm/attention/decode_launch.hpp"

namespace liquidgemm::attention {

cudaError_t decode_int8(KvAttentionArguments const& arguments, cudaStream_t stream) {
  return launch_decode<KvFormat::kInt8>(arguments, stream);
}

}  // namespace liquidgemm::attention
