#include "liquidgemm/attention/decode_launch.hpp"

namespace liquidgemm::attention {

cudaError_t decode_int4(KvAttentionArguments const& arguments, cudaStream_t stream) {
  return launch_decode<KvFormat::kInt4>(arguments, stream);
}

}  // namespace liquidgemm::attention
