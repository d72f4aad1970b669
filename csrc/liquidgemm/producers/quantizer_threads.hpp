// How the quantization kernel divides a row of activations: known to it, and on the host to the
// choice of plans for the GEMM behind it.
#pragma once

namespace liquidgemm {

inline constexpr int kVector = 8;  // elements that a thread loads, converts and stores at once
inline constexpr int kMaxQuantizerThreads = 1024;  // of a CTA, which has one row or a part of it

}  // namespace liquidgemm
